"""The network interfaces of this host."""

from __future__ import annotations

import socket
import struct

from ..errors import UserError

SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def address_of(name: str) -> str:
    """The IPv4 address of a network interface of this host, such as wg0. Raises UserError."""
    import fcntl

    there = [known for _, known in socket.if_nameindex()]
    if name not in there:
        raise UserError(f"this host has no network interface {name!r:.40}; it has {', '.join(sorted(there))}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            found = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("16s24x", name.encode()))
        except OSError:
            raise UserError(f"the network interface {name} has no IPv4 address: bring it up first") from None
    return socket.inet_ntoa(found[20:24])
