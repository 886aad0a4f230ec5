"""rave.lock: what an image was made of, by name, version and hash. Pure but for the file.

The file is JSON that a person can read as a diff: one part a line. It is kept
beside rave.yaml, to be committed; `build --locked` holds the next build to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ravectl import files
from ravectl.errors import RavectlError

LOCK_FILE = "rave.lock"
VERSION = 1
MAX_SHOWN = 12  # of what drifted; the count tells the rest


@dataclass(frozen=True)
class Lock:
    """The parts of an image: (name, version, hash), each list sorted."""

    engine: str
    suite: str
    packages: tuple[tuple[str, str, str], ...]
    npm: tuple[tuple[str, str, str], ...]


def dump(lock: Lock) -> str:
    """The text of rave.lock: JSON with a part on each line."""
    head = {"version": VERSION, "engine": lock.engine, "suite": lock.suite}
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in head.items()]
    parts = []
    for key, rows in (("packages", lock.packages), ("npm", lock.npm)):
        body = ",\n".join(f"    {json.dumps(list(row))}" for row in rows)
        parts.append(f"  {json.dumps(key)}: [\n{body}\n  ]")
    return "{\n" + "\n".join(lines) + "\n" + ",\n".join(parts) + "\n}\n"


def read(path: Path) -> Lock:
    """The lock at `path`; RavectlError when there is none or it is damaged."""
    if not path.exists():
        raise RavectlError(
            f"there is no {path.name} in {path.parent}", "make it by a build without --locked"
        )
    try:
        return _parse(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as e:
        raise RavectlError(
            f"{path} is damaged: {e}",
            f"restore it from git, or make it anew: rm '{path}', then ravectl build",
        ) from None


def _parse(value: Any) -> Lock:
    if value["version"] != VERSION:
        raise ValueError(f"version {value['version']!r}, this ravectl knows {VERSION}")
    return Lock(value["engine"], value["suite"], _rows(value["packages"]), _rows(value["npm"]))


def _rows(value: Any) -> tuple[tuple[str, str, str], ...]:
    rows = []
    for row in value:
        name, version, digest = row
        if not all(isinstance(word, str) for word in row):
            raise ValueError(f"{row!r} is no [name, version, hash]")
        rows.append((name, version, digest))
    return tuple(rows)


def write(path: Path, lock: Lock) -> bool:
    """Write the lock unless it says the same already; whether it was written."""
    text = dump(lock)
    if path.exists() and path.read_text() == text:
        return False
    files.write_atomic(path, text)
    return True


def drift(locked: Lock, seen: Lock) -> list[str]:
    """A line for each part in which `seen` differs from `locked`."""
    lines = []
    for what in ("engine", "suite"):
        was, now = getattr(locked, what), getattr(seen, what)
        if was != now:
            lines.append(f"{what}: {was} -> {now}")
    for kind, old, new in (("", locked.packages, seen.packages), ("npm ", locked.npm, seen.npm)):
        lines += _drift_of(kind, old, new)
    return lines


def _drift_of(
    kind: str, old: tuple[tuple[str, str, str], ...], new: tuple[tuple[str, str, str], ...]
) -> list[str]:
    was, now = {r[0]: r for r in old}, {r[0]: r for r in new}
    lines = []
    for name in sorted(was.keys() | now.keys()):
        if name not in now:
            lines.append(f"{kind}{name}: {was[name][1]} -> gone")
        elif name not in was:
            lines.append(f"{kind}{name}: new, {now[name][1]}")
        elif was[name][1] != now[name][1]:
            lines.append(f"{kind}{name}: {was[name][1]} -> {now[name][1]}")
        elif was[name][2] != now[name][2]:
            lines.append(f"{kind}{name} {now[name][1]}: other bits under the same version")
    return lines


def require_same(locked: Lock, seen: Lock) -> None:
    """Raise RavectlError naming what drifted, unless nothing did."""
    lines = drift(locked, seen)
    if not lines:
        return
    shown = lines[:MAX_SHOWN]
    if len(lines) > MAX_SHOWN:
        shown.append(f"and {len(lines) - MAX_SHOWN} more")
    raise RavectlError(
        f"{len(lines)} part{'s' if len(lines) > 1 else ''} of the image drifted from {LOCK_FILE}",
        f"accept it by a build without --locked and commit {LOCK_FILE}; or build with the mirror "
        "that had the locked versions",
        details="\n".join(shown),
    )
