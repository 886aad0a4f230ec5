"""What listens on a machine, from `ss -Hltnup`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ravectl.verify.guest import number

# A DHCP client holds its port on the address that it has got. It is no server: what comes to
# it unasked is the firewall's to drop.
DHCP_CLIENT_PORTS = (68, 546)
DHCP_CLIENTS = ("systemd-networkd.service", "dhcpcd.service")
GONE = "gone"  # in the place of a path: a worker that ended while it was asked
WILDCARDS = ("*", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


@dataclass(frozen=True)
class Listener:
    """A socket that waits for others."""

    protocol: str  # tcp or udp
    address: str
    port: int
    program: str
    pids: tuple[int, ...] = ()

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

    def dhcp_client(self, owners: Mapping[int, str]) -> bool:
        """Whether it is the port of a DHCP client, on an address of its own."""
        named = self.address not in WILDCARDS and self.port in DHCP_CLIENT_PORTS
        return self.protocol == "udp" and named and self.of(DHCP_CLIENTS, owners)

    def of(self, units: Sequence[str], owners: Mapping[int, str]) -> bool:
        """Whether all who hold it are of these units, but for systemd, which holds some for them.

        `owners` has the path of each process' cgroup.
        """
        paths = [owners.get(pid, "") for pid in self.pids if pid != 1]
        there = [path for path in paths if path != GONE]
        return bool(there) and all(
            path.startswith("/system.slice/") and set(units) & set(path.split("/"))
            for path in there
        )

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
        pids = tuple(int(pid) for pid in re.findall(r",pid=(\d{1,10}),", line))
        found.append(Listener(words[0], name, port, program[1] if program else "", pids))
    return found


def parse_owners(text: str) -> dict[int, str]:
    """The path of the cgroup of each process, from lines of its pid and /proc/PID/cgroup."""
    rows = re.findall(rf"^(\d{{1,10}}) (?:0::)?(/\S*|{GONE})$", text, re.M)
    return {int(pid): path for pid, path in rows}


def faults(
    sockets: Sequence[Listener],
    open_ports: Sequence[int],
    planned: Mapping[int, str],
    owners: Mapping[int, str],
) -> list[str]:
    """Listeners that should not be where they are or are not of the unit whose port it is, and
    open ports that nothing listens on. `planned` has the unit of each port of the Plan."""
    outside = [s for s in sockets if not s.loopback and not s.dhcp_client(owners)]
    inside = [s for s in sockets if s.loopback]
    found = [
        f"{s} listens to the outside"
        for s in outside
        if s.protocol != "tcp" or s.port not in open_ports
    ]
    reachable = {s.port for s in outside if s.protocol == "tcp"}
    found += [f"nothing listens on port {p}" for p in open_ports if p not in reachable]
    found += [f"{s} is not in the Plan" for s in inside if s.port not in planned]
    found += [
        f"{s} is not of {planned[s.port]}"
        for s in (*outside, *inside)
        if s.port in planned and not s.of((planned[s.port],), owners)
    ]
    return found
