"""Four hosts on this machine: namespaces on one switch, with names, addresses, and links that can be slow or cut.

Each has an interface e0 with its name's address, and one more for each further network, e1 and so on. With disks of their own,
all hosts have a folder of the same path, and each finds there what it has put there itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

COUNT = 4
AGENT = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
host=$1; shift
for name in "$host" "$(hostname)"; do
    ip -n {switch} link show "p${name:1:1}" | grep -q "state UP" || exit 255
done
declare -A holders=({holders})
exec nsenter -t "${holders[$host]}" -n -u -m /bin/bash -c "$*"
"""
# A host lasts as long as the process that holds its namespaces, which waits for the end of its input.
HOLD = 'set -e; hostname "$0"; test -z "$1" || mount --bind "$1" "$2"; echo up; exec cat'
ENTER = 'exec nsenter -t "$0" -n -u -m /bin/bash -c \'cd "$0" && exec "$@"\' "$PWD" "$@"'  # the same path, maybe another disk


def missing() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "ip and unshare are not installed: apt-get install iproute2 util-linux"
    if os.geteuid():
        return "network namespaces need root"
    name = f"dllm-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode == 0:
        _ip("netns", "del", name)
    return done.stderr.strip() or None


class Hosts:
    """Up from its making to the end of its `with`.

    Parameters
    ----------
    folder : path
        An empty one, for what the hosts need.
    networks : int
        To which each host has an interface.
    disks : bool
        Whether each host has a disk of its own, at `path`. What lies elsewhere all hosts see.
    """

    def __init__(self, folder: str | pathlib.Path, networks: int = 1, disks: bool = False) -> None:
        self.networks, self.disks, self.holders = networks, disks, list[int]()
        self.folder, tag = pathlib.Path(folder), f"{os.getpid():x}"
        self.names = [f"h{number}-{tag}" for number in range(1, COUNT + 1)]
        self.switch, self.agent, self.file = f"switch-{tag}", self.folder / "agent", self.folder / "hosts"
        self.file.write_text("".join(f"{name} slots=1\n" for name in self.names))
        self.path = self.folder / "disk"
        for place in (self.path, *map(self.disk, range(1, COUNT + 1))) if disks else ():
            place.mkdir()

    def __enter__(self) -> Hosts:
        with contextlib.ExitStack() as self.stack:  # which undoes what was done where this fails
            self._add(self.switch)
            for net in range(self.networks):
                _ip("-n", self.switch, "link", "add", f"br{net}", "type", "bridge")
                _ip("-n", self.switch, "link", "set", f"br{net}", "up")
            addresses = "".join(f"10.77.0.{number} {name}\n" for number, name in enumerate(self.names, 1))
            for number, name in enumerate(self.names, 1):
                self._add(name)
                known = pathlib.Path("/etc/netns", name)  # what a namespace sees as /etc
                known.mkdir(parents=True)
                self.stack.callback(shutil.rmtree, known)
                (known / "hosts").write_text("127.0.0.1 localhost\n" + addresses)
                for net in range(self.networks):
                    mine, port = f"e{net}", self.port(number, net)
                    _ip("link", "add", mine, "netns", name, "type", "veth", "peer", "name", port, "netns", self.switch)
                    _ip("-n", self.switch, "link", "set", port, "master", f"br{net}", "up")
                    _ip("-n", name, "addr", "add", f"10.77.{net}.{number}/24", "dev", mine)
                    _ip("-n", name, "link", "set", mine, "up")
            self.holders = [self._hold(number) for number in range(1, COUNT + 1)]
            places = " ".join(f"[{name}]={pid}" for name, pid in zip(self.names, self.holders, strict=True))
            self.agent.write_text(AGENT.replace("{switch}", self.switch).replace("{holders}", places))
            self.agent.chmod(0o755)
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self.stack.callback(_ip, "netns", "del", name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _hold(self, number: int) -> int:
        """Start the process in whose namespaces a host's others run. Returns its id."""
        name, disk = self.names[number - 1], self.disk(number) if self.disks else ""
        words = ["ip", "netns", "exec", name, "unshare", "-u", "/bin/bash", "-c", HOLD, name, disk, self.path]
        holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.stack.callback(holder.wait, 20)
        self.stack.callback(holder.kill)
        if holder.stdout is None or holder.stdout.readline() != b"up\n":
            raise OSError(f"host {number} did not come up")
        return holder.pid

    def disk(self, number: int) -> pathlib.Path:
        """Where others than host `number`, from 1, find what that has at `path`."""
        return self.folder / f"disk-{number}"

    def wipe(self, number: int) -> None:
        """Leave nothing on the disk of host `number`, from 1."""
        for path in self.disk(number).iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def kill(self, number: int) -> None:
        """SIGKILL to every process of host `number`, from 1, until none is left. Raises TimeoutError."""
        end = time.monotonic() + 20
        while left := self._processes(number):
            if time.monotonic() > end:
                raise TimeoutError(f"host {number} still has the processes {left}")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _processes(self, number: int) -> list[int]:
        """Those that run on a host, without its holder and without zombies."""
        words = ["ip", "netns", "pids", self.names[number - 1]]
        found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return [pid for pid in map(int, found) if pid != self.holders[number - 1]]

    @staticmethod
    def port(number: int, net: int = 0) -> str:
        """The switch's end of the link of host `number`, from 1, to a network."""
        return f"{'pqrs'[net]}{number}"

    def cut(self, number: int) -> None:
        """Cut the link of host `number`, from 1."""
        _ip("-n", self.switch, "link", "set", f"p{number}", "down")

    def heal(self, number: int) -> None:
        """Undo `cut`."""
        _ip("-n", self.switch, "link", "set", f"p{number}", "up")

    def limit(self, megabits: float) -> None:
        """Let every link carry so many Mbit/s each way; 0: whatever it can."""
        for number, name in enumerate(self.names, 1):
            for space, device in ((name, "e0"), (self.switch, f"p{number}")):
                tc = ["ip", "netns", "exec", space, "tc", "qdisc"]
                subprocess.run([*tc, "del", "dev", device, "root"], capture_output=True, timeout=20, check=False)
                if megabits:
                    shape = ["tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "200ms"]
                    subprocess.run([*tc, "add", "dev", device, "root", *shape], check=True, timeout=20)

    def sent(self) -> list[int]:
        """Bytes that each host has sent over its link until now."""
        show = [["ip", "-n", name, "-s", "-j", "link", "show", "e0"] for name in self.names]
        found = [subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout for words in show]
        return [json.loads(text)[0]["stats64"]["tx"]["bytes"] for text in found]

    def on(self, number: int) -> list[str]:
        """The words before a command that runs it on host `number`, in the folder of the same path: `path`, or a shared one."""
        return ["/bin/bash", "-c", ENTER, str(self.holders[number - 1])]

    def agents(self) -> dict[str, object]:
        """Variables with which both MPIs reach these hosts, in place of ssh."""
        return {
            "PRTE_MCA_plm_ssh_agent": self.agent, "HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": self.agent,
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "UCX_TLS": "tcp,self",  # in truth all hosts are one machine, whose memory UCX would use
        }  # fmt: skip

    def environment(self) -> dict[str, object]:
        """Variables that make both MPIs use these hosts' first network."""
        return self.agents() | {
            "PRTE_MCA_prte_if_include": "e0", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,tcp",
            "OMPI_MCA_btl_tcp_if_include": "10.77.0.0/24",
            "HYDRA_IFACE": "e0", "UCX_NET_DEVICES": "e0",
        }  # fmt: skip


def _ip(*words: object) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)
