"""Network interfaces of this machine, such as wg0, by their names."""

from __future__ import annotations

import fcntl
import socket
import struct

from ..errors import UserError

SIOCGIFADDR = 0x8915  # of netdevice(7): the IPv4 address of an interface
NAME = 15  # bytes that the name of an interface may have


def address_of(name: str) -> str:
    """The IPv4 address of a network interface. Raises UserError where there is none of that name or it has none."""
    there = sorted(found for _, found in socket.if_nameindex())
    if name not in there:
        raise UserError(f"--interface {name[:50]}: there is none of that name here; there is {', '.join(there)}")
    request = struct.pack("256s", name.encode()[:NAME])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
        except OSError:
            raise UserError(f"--interface {name}: it has no IPv4 address; give it one, or name another") from None
    return socket.inet_ntoa(answer[20:24])  # struct ifreq: 16 bytes of name, 2 of family, 2 of port, 4 of address
