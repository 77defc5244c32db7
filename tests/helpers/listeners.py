"""Where the processes of a job can be reached: sockets of TCP that listen, and those of UDP that are bound."""

import contextlib
import ipaddress
import os
import pathlib
import re
import subprocess


def listeners(pids):
    """(inode, address, device or "", port) of every socket at which one of the processes can be reached."""
    inodes = set().union(*(_sockets(pid) for pid in pids))
    rows = subprocess.run(["ss", "-HOlntue"], capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    found = []
    for row in rows:
        match = re.match(
            r"\S+ +\S+ +\d+ +\d+ +(?P<address>\S+?)(%(?P<device>[^:]+))?:(?P<port>\d+) .*\bino:(?P<inode>\d+)", row
        )
        if match and match["inode"] in inodes:
            found.append((match["inode"], match["address"].strip("[]"), match["device"] or "", int(match["port"])))
    return found


def elsewhere(pids):
    """Those of `listeners` that other hosts can reach, as lines: not at a loopback address, nor bound to its device."""
    return [
        f"{address}{'%' * bool(device)}{device}:{port} of {_owners(inode, pids)}"
        for inode, address, device, port in listeners(pids)
        if device != "lo" and (address == "*" or not ipaddress.ip_address(address).is_loopback)
    ]


def _owners(inode, pids):
    return [(pid, pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()[:60]) for pid in pids if inode in _sockets(pid)]


def _sockets(pid):
    """Inodes of the sockets that a process holds."""
    links = []
    with contextlib.suppress(OSError):
        for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(entry))
    return {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
