"""Captures every frame that enters a switch of benchmarks/hosts.py, and puts the streams of TCP together again.

`Capture` runs this file inside the switch's network namespace: an AF_PACKET socket sees frames there as the ports take them in.
"""

import collections
import ctypes
import pathlib
import select
import signal
import socket
import struct
import subprocess
import sys
import time

ALL, OUTGOING = 3, 4  # ETH_P_ALL, PACKET_OUTGOING
PACKET, STATISTICS, FORCE = 263, 6, 33  # SOL_PACKET, PACKET_STATISTICS, SO_RCVBUFFORCE
BUFFER = 1 << 29  # bytes that may wait to be written
FRAME = 1 << 17  # bytes; veth hands on what TCP has not cut up yet
SYN = 2


class Capture:
    """From the beginning to the end of its `with`, of all ports of a namespace whose names start with one of `ports`.

    Attributes, after the end
    -------------------------
    frames, size : int
        How many, and bytes.
    streams : dict
        (source, its port, target, its port, number) -> bytes that went that way over one connection.
    rest : bytes
        All frames that are not of TCP, one after the other.
    """

    def __init__(self, namespace, folder, ports=("p", "q")):
        self.namespace, self.path, self.ports = namespace, pathlib.Path(folder) / f"wire-{time.monotonic_ns()}", ports
        self.streams, self.rest, self.frames, self.size = {}, b"", 0, 0

    def __enter__(self):
        words = ["ip", "netns", "exec", self.namespace, sys.executable, __file__, self.path, *self.ports]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, kind, *error):
        time.sleep(0.2)  # what is under way arrives
        self.process.send_signal(signal.SIGTERM)
        try:
            counts, _ = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
            self.process.wait(10)
        if kind is None:
            dropped = int(counts)
            assert dropped == 0, f"the capture lost {dropped} frames"
            self._read()
        self.path.unlink(missing_ok=True)

    def _read(self):
        data, at = self.path.read_bytes(), 0
        rest, parts, numbers = [], collections.defaultdict(list), collections.Counter()
        while at < len(data):
            (length,) = struct.unpack_from("<I", data, at)
            frame, at = data[at + 4 : at + 4 + length], at + 4 + length
            self.frames, self.size = self.frames + 1, self.size + length
            segment = _tcp(frame)
            if segment is None:
                rest.append(frame)
                continue
            flow, sequence, flags, payload = segment
            if flags & SYN:
                if (*flow, numbers[flow]) in parts and parts[(*flow, numbers[flow])][0][0] != sequence + 1:
                    numbers[flow] += 1  # the port was used anew
                sequence += 1
            parts[(*flow, numbers[flow])].append((sequence, payload))
        self.streams, self.rest = {flow: _joined(found) for flow, found in parts.items()}, b"".join(rest)

    def payload(self):
        """(what, bytes) of everything that was captured."""
        return [*((f"{a}:{p} to {b}:{q}", data) for (a, p, b, q, _), data in self.streams.items()), ("not TCP", self.rest)]


def _tcp(frame):
    """((source, port, target, port), sequence, flags, payload) of a frame of TCP, else None."""
    if frame[12:14] == b"\x08\x00":
        header, protocol, total = (frame[14] & 15) * 4, frame[23], struct.unpack_from(">H", frame, 16)[0]
        source, target = (socket.inet_ntoa(frame[at : at + 4]) for at in (26, 30))
        end = 14 + total if total else len(frame)
    elif frame[12:14] == b"\x86\xdd":
        header, protocol, total = 40, frame[20], struct.unpack_from(">H", frame, 18)[0]
        source, target = (socket.inet_ntop(socket.AF_INET6, frame[at : at + 16]) for at in (22, 38))
        end = 54 + total if total else len(frame)
    else:
        return None
    if protocol != socket.IPPROTO_TCP:
        return None
    at = 14 + header
    port, other, sequence = struct.unpack_from(">HHI", frame, at)
    return (source, port, target, other), sequence, frame[at + 13], frame[at + (frame[at + 12] >> 4) * 4 : end]


def _joined(parts):
    """The bytes of segments (sequence, payload), in their order; sequences start anywhere and may pass 2^32."""
    found, position, last = bytearray(), 0, parts[0][0]
    placed = []
    for sequence, payload in parts:  # in the order of arrival: near the one before
        position += (sequence - last + (1 << 31)) % (1 << 32) - (1 << 31)
        last = sequence
        placed.append((position, payload))
    start = min(at for at, _ in placed)
    for at, payload in sorted(placed, key=lambda part: part[0]):
        at -= start
        if payload:
            found.extend(bytes(max(0, at - len(found))))
            found[at : at + len(payload)] = payload
    return bytes(found)


def main(path, *ports):
    """Write frames to a file until SIGTERM; then print how many were lost."""
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL)) as tap, open(path, "wb", 1 << 22) as file:
        tap.setsockopt(socket.SOL_SOCKET, FORCE, BUFFER)
        tap.setblocking(False)
        print("ready", flush=True)
        while not ended or select.select([tap], [], [], 0)[0]:
            if not select.select([tap], [], [], 0.2)[0]:
                continue
            frame, (device, _, kind, _, _) = tap.recvfrom(FRAME)
            if kind != OUTGOING and device.startswith(ports):
                file.write(struct.pack("<I", len(frame)))
                file.write(frame)
        counts = (ctypes.c_uint * 2).from_buffer_copy(tap.getsockopt(PACKET, STATISTICS, 8))
        print(counts[1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
