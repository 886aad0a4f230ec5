"""What an nftables ruleset lets in, from `nft -j list ruleset` (libnftables-json(5)).

Every rule that ends in `accept` and can be reached from an input hook must be of a harmless
kind: from loopback, of a connection that exists, ICMP, or TCP to an open port. What is not
understood counts as letting something in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 16  # as deep as the kernel lets chains jump

Rule = Sequence[Any]
ChainKey = tuple[str, str, str]  # family, table, name


@dataclass
class Ruleset:
    """The parts of a ruleset that decide what comes in and what goes out."""

    hooks: list[tuple[ChainKey, str]] = field(default_factory=list)  # input chains, policy
    outward: list[tuple[ChainKey, str]] = field(default_factory=list)  # output chains, policy
    rules: dict[ChainKey, list[Rule]] = field(default_factory=dict)
    sets: dict[ChainKey, list[Any]] = field(default_factory=dict)


def parse(text: str) -> Ruleset | None:
    """The ruleset, or None when `text` is not one."""
    try:
        items = json.loads(text)["nftables"]
        found = Ruleset()
        for item in items:
            _take(found, item)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if items else None


def _take(found: Ruleset, item: Mapping[str, Any]) -> None:
    if "chain" in item:
        chain = item["chain"]
        key = (chain["family"], chain["table"], chain["name"])
        found.rules.setdefault(key, [])
        hooks = {"input": found.hooks, "output": found.outward}
        if chain.get("hook") in hooks and chain.get("type") == "filter":
            hooks[chain["hook"]].append((key, str(chain.get("policy", "accept"))))
    elif "rule" in item:
        rule = item["rule"]
        key = (rule["family"], rule["table"], rule["chain"])
        found.rules.setdefault(key, []).append(list(rule.get("expr", [])))
    elif "set" in item or "map" in item:
        body = item.get("set") or item["map"]
        key = (body["family"], body["table"], body["name"])
        found.sets[key] = list(body.get("elem", []))


def faults(ruleset: Ruleset, open_ports: Sequence[int]) -> list[str]:
    """Why packets other than those to `open_ports` could come in, or those could not."""
    guards = [key for key, policy in ruleset.hooks if policy == "drop"]
    covered = {"inet" if k[0] == "inet" else k[0] for k in guards}
    if "inet" not in covered and not {"ip", "ip6"} <= covered:
        return ["no firewall: no input chain drops what it does not know"]
    found, accepted = [], set()
    for key in guards:
        for matches in _accepting(ruleset, key, (), 0):
            ports = _open_to(ruleset, key, matches)
            if ports is None:
                found.append(f"the firewall also accepts: {_describe(matches)}")
            else:
                accepted |= ports
    found += [f"the firewall accepts port {p}" for p in sorted(accepted - set(open_ports))][:5]
    found += [f"the firewall does not accept port {p}" for p in open_ports if p not in accepted]
    return found


def outward_faults(ruleset: Ruleset) -> list[str]:
    """Why something could go out of a machine that reaches nothing but itself."""
    guards = [key for key, policy in ruleset.outward if policy == "drop"]
    covered = {k[0] for k in guards}
    if "inet" not in covered and not {"ip", "ip6"} <= covered:
        return ["no output chain drops what it does not know"]
    return [
        f"the firewall lets out: {_describe(matches)}"
        for key in guards
        for matches in _accepting(ruleset, key, (), 0)
        if not any(_is_within(m) or _is_answer(m) for m in matches)
    ]


def _is_within(condition: Any) -> bool:
    """Whether it holds only of what does not leave the machine."""
    keys = ({"meta": {"key": key}} for key in ("oif", "oifname"))
    return any(condition == {"match": {"op": "==", "left": k, "right": "lo"}} for k in keys)


def _is_answer(condition: Any) -> bool:
    """Whether it holds only of packets of connections that are there."""
    match = condition.get("match") if isinstance(condition, dict) else None
    if not isinstance(match, dict) or match.get("left") != {"ct": {"key": "state"}}:
        return False
    right = match.get("right")
    return match.get("op") in ("in", "==") and {"established", "related"} >= set(
        right if isinstance(right, list) else [right]
    )


def unlimited(ruleset: Ruleset, open_ports: Sequence[int]) -> list[int]:
    """Ports at which new connections are not limited by address."""
    limited = set()
    for key, _ in ruleset.hooks:
        for rule in ruleset.rules.get(key, []):
            drops = any(isinstance(p, dict) and "drop" in p for p in rule)
            counts = any(
                isinstance(p, dict) and '"limit"' in json.dumps(p.get("set")) for p in rule
            )
            if drops and counts:
                limited |= {p for p in open_ports if _names_port(rule, p)}
    return [p for p in open_ports if p not in limited]


def _names_port(rule: Rule, port: int) -> bool:
    left = {"payload": {"protocol": "tcp", "field": "dport"}}
    return {"match": {"op": "==", "left": left, "right": port}} in rule


def _accepting(
    ruleset: Ruleset, key: ChainKey, so_far: tuple[Any, ...], depth: int
) -> Iterator[tuple[Any, ...]]:
    """The conditions under which a packet is accepted by a chain, one tuple for each way."""
    if depth > MAX_DEPTH:
        yield (*so_far, "chains nested too deep")
        return
    for rule in ruleset.rules.get(key, []):
        matches = so_far
        for part in rule:
            if not isinstance(part, dict) or len(part) != 1:
                matches = (*matches, part)
                continue
            (kind, body), *_ = part.items()
            if kind == "match":
                matches = (*matches, part)
            elif kind == "vmap":
                for condition, verdict in _vmap(ruleset, key, body):
                    yield from _verdict(ruleset, key, (*matches, condition), verdict, depth)
            else:
                yield from _verdict(ruleset, key, matches, part, depth)


def _verdict(
    ruleset: Ruleset, key: ChainKey, matches: tuple[Any, ...], verdict: Any, depth: int
) -> Iterator[tuple[Any, ...]]:
    if not isinstance(verdict, dict):
        return
    if "accept" in verdict or "queue" in verdict:
        yield matches
    for kind in ("jump", "goto"):
        if isinstance(body := verdict.get(kind), dict):
            target = (key[0], key[1], str(body.get("target")))
            yield from _accepting(ruleset, target, matches, depth + 1)


def _vmap(ruleset: Ruleset, key: ChainKey, body: Any) -> Iterator[tuple[Any, Any]]:
    """A verdict map as pairs of a condition and a verdict."""
    if not isinstance(body, dict):
        return
    for pair in _elements(ruleset, key, body.get("data")):
        if isinstance(pair, list) and len(pair) == 2:
            yield {"match": {"op": "==", "left": body.get("key"), "right": pair[0]}}, pair[1]


def _elements(ruleset: Ruleset, key: ChainKey, value: Any) -> list[Any]:
    """The elements that the right side of a match stands for."""
    if isinstance(value, str) and value.startswith("@"):
        return ruleset.sets.get((key[0], key[1], value[1:]), [value])
    if isinstance(value, dict) and isinstance(value.get("set"), list):
        return list(value["set"])
    if isinstance(value, list):
        return value
    return [value]


def _open_to(ruleset: Ruleset, key: ChainKey, matches: Iterable[Any]) -> set[int] | None:
    """The TCP ports that a way in leads to: none when harmless, None when it may be anything."""
    for part in matches:
        match = part.get("match") if isinstance(part, dict) else None
        if not isinstance(match, dict) or match.get("op") not in ("==", "in"):
            continue
        left, values = match.get("left"), _elements(ruleset, key, match.get("right"))
        if _harmless(left, values):
            return set()
        if _field(left) in (("tcp", "dport"), ("th", "dport")):
            return _ports(values) if _only_tcp(left, matches) else None
    return set() if _dhcp6(ruleset, key, matches) else None


def _field(left: Any) -> tuple[str, str] | None:
    payload = left.get("payload") if isinstance(left, dict) else None
    if not isinstance(payload, dict):
        return None
    return str(payload.get("protocol")), str(payload.get("field"))


def _harmless(left: Any, values: Sequence[Any]) -> bool:
    """Whether a match takes only loopback, existing connections, or ICMP."""
    if not isinstance(left, dict) or not values:
        return False
    meta, ct = left.get("meta"), left.get("ct")
    if isinstance(meta, dict):
        wanted = {
            "iif": ("lo",), "iifname": ("lo",),
            "l4proto": ("icmp", "ipv6-icmp", "icmpv6"),
        }.get(str(meta.get("key")), ())  # fmt: skip
        return all(v in wanted for v in values)
    if isinstance(ct, dict) and ct.get("key") == "state":
        return all(v in ("established", "related") for v in values)
    return _field(left) in (
        ("icmp", "type"), ("icmpv6", "type"), ("icmp", "code"), ("icmpv6", "code"),
        ("ip", "protocol"),
    ) and (_field(left) != ("ip", "protocol") or all(v == "icmp" for v in values))  # fmt: skip


def _only_tcp(left: Any, matches: Iterable[Any]) -> bool:
    if _field(left) == ("tcp", "dport"):
        return True
    return any(
        isinstance(m, dict)
        and m.get("match", {}).get("left") == {"meta": {"key": "l4proto"}}
        and m["match"].get("right") == "tcp"
        for m in matches
    )


def _ports(values: Sequence[Any]) -> set[int] | None:
    found: set[int] = set()
    for value in values:
        if isinstance(value, dict) and isinstance(value.get("elem"), dict):
            value = value["elem"].get("val")  # noqa: PLW2901 - an element with a counter or comment
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, dict) and isinstance(value.get("range"), list):
            ends = value["range"]
            if len(ends) != 2 or not all(isinstance(e, int) and 0 <= e <= 65535 for e in ends):
                return None
            found |= set(range(ends[0], ends[1] + 1))
        else:
            return None
    return found


def _dhcp6(ruleset: Ruleset, key: ChainKey, matches: Iterable[Any]) -> bool:
    """Whether a way in is for answers to a DHCPv6 client, as NixOS has it: link-local, port 546."""
    link_local = port = False
    for part in matches:
        match = part.get("match") if isinstance(part, dict) else None
        if not isinstance(match, dict) or match.get("op") != "==":
            continue
        if _field(match.get("left")) == ("ip6", "daddr"):
            link_local = match.get("right") == {"prefix": {"addr": "fe80::", "len": 64}}
        if _field(match.get("left")) == ("udp", "dport"):
            port = _elements(ruleset, key, match.get("right")) == [546]
    return link_local and port


def _describe(matches: Iterable[Any]) -> str:
    text = json.dumps([m.get("match", m) if isinstance(m, dict) else m for m in matches])
    return "anything" if text == "[]" else text[:200]
