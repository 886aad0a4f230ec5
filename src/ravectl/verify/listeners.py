"""What listens on a machine, from `ss -Hltnup`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ravectl.verify.guest import number

# A DHCP client holds its port on the address that it has got. It is no server: what comes to
# it unasked is the firewall's to drop.
DHCP_CLIENT_PORTS = (68, 546)
WILDCARDS = ("*", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True)
class Listener:
    """A socket that waits for others."""

    protocol: str  # tcp or udp
    address: str
    port: int
    program: str

    @property
    def loopback(self) -> bool:
        """Whether only the machine itself can reach it."""
        try:
            address = ipaddress.ip_address(self.address)
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return address.is_loopback

    @property
    def dhcp_client(self) -> bool:
        """Whether it is the port of a DHCP client, on an address of its own."""
        named = self.address not in WILDCARDS
        return self.protocol == "udp" and self.port in DHCP_CLIENT_PORTS and named

    def __str__(self) -> str:
        program = f" ({self.program})" if self.program else ""
        return f"{self.protocol} {self.address}:{self.port}{program}"


def parse(text: str) -> list[Listener]:
    """The listeners; empty when any line is not of the form."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        local = words[4] if len(words) >= 6 else ""
        address, colon, digits = local.rpartition(":")
        port = number(digits)
        if words[0] not in ("tcp", "udp") or not colon or port is None:
            return []
        program = re.search(r'\(\("([^"]+)"', line)
        name = address.split("%")[0].strip("[]")
        found.append(Listener(words[0], name, port, program[1] if program else ""))
    return found


def faults(
    sockets: Sequence[Listener], open_ports: Sequence[int], planned: Sequence[int]
) -> list[str]:
    """Listeners that should not be where they are, and open ports that nothing listens on."""
    outside = [s for s in sockets if not s.loopback and not s.dhcp_client]
    inside = [s for s in sockets if s.loopback]
    found = [
        f"{s} listens to the outside"
        for s in outside
        if s.protocol != "tcp" or s.port not in open_ports
    ]
    reachable = {s.port for s in outside if s.protocol == "tcp"}
    found += [f"nothing listens on port {p}" for p in open_ports if p not in reachable]
    found += [f"{s} is not in the Plan" for s in inside if s.port not in planned]
    return found
