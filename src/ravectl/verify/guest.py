"""Scripts for the guest and the form of their answers.

One script per probe: builtins where they do, as few processes as can be. Its output is
sections, each under a line `== name ==`, and ends with the section `end`, so that an answer
that was cut off is never judged.
"""

from __future__ import annotations

import re
import time

from ravectl.errors import RavectlError
from ravectl.verify.framework import VerifyTarget

END = "== end =="
_HEAD = re.compile(r"== ([a-z]+) ==")
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(y|month|w|d|h|min|s|ms|us|μs)")
_UNIT_US = {
    "y": 31_557_600e6, "month": 2_629_800e6, "w": 604_800e6, "d": 86_400e6, "h": 3_600e6,
    "min": 60e6, "s": 1e6, "ms": 1e3, "us": 1.0, "μs": 1.0,
}  # fmt: skip


def run_script(target: VerifyTarget, script: str, deadline: float, *, root: bool = False) -> str:
    """Run a bash script in the guest and return its standard output.

    Raises RavectlError when bash itself could not do it; a command that fails inside the
    script shows in the output, where the judgement sees it.
    """
    # by standard input, so that sudo's log line does not hold the script; in braces, so that
    # bash has read all of it before a command in it could read the rest
    text = (
        f"{{ export LC_ALL=C SYSTEMD_COLORS=0 SYSTEMD_PAGER=\n{script}\necho '{END}'; exit 0; }}\n"
    )
    argv = ["sudo", "-n", "bash", "-s"] if root else ["bash", "-s"]
    left = max(deadline - time.monotonic(), 0.1)
    result = target.connection.run(argv, stdin=text.encode(), timeout=left)
    if result.returncode != 0:
        raise RavectlError(
            f"a script in the machine failed (exit {result.returncode})",
            "look at the machine's journal: ravectl logs",
            details=result.stderr.strip()[-300:],
        )
    return result.stdout


def sections(output: str) -> dict[str, str] | None:
    """The sections of an answer by name, or None when it is not complete."""
    lines = output.rstrip().splitlines()
    if not lines or lines[-1] != END:
        return None
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines[:-1]:
        if head := _HEAD.fullmatch(line):
            current = found.setdefault(head[1], [])
        elif current is not None:
            current.append(line)
    return {name: "\n".join(body) for name, body in found.items()}


def properties(text: str) -> list[dict[str, str]]:
    """What `systemctl show` printed: a dictionary per unit."""
    blocks = [dict(_pairs(block)) for block in re.split(r"\n\s*\n", text)]
    return [b for b in blocks if b]


def _pairs(block: str) -> list[tuple[str, str]]:
    found = []
    for line in block.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            found.append((key, value))
    return found


def number(text: str | None) -> int | None:
    """A non-negative decimal number, or None."""
    # isascii: isdigit alone takes digits that int() does not, like superscripts
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 20:
        return None
    return int(text)


def timespan_us(text: str) -> int | None:
    """A time span as systemd prints it (`1min 30s`, `1.500s`), in microseconds."""
    if not re.fullmatch(rf"(?:{_SPAN.pattern}\s*)+", text) or len(text) > 100:
        return None
    return round(sum(float(n) * _UNIT_US[unit] for n, unit in _SPAN.findall(text)))
