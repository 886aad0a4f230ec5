"""What is on disk of a change to the secrets, so that one that was cut short can be ended.

A change writes the new encrypted files beside the old ones, then the journal. The journal's
phase is what decides: `prepared` means that the old files hold, `committed` that the new ones
do, whether or not they are in their places yet. Values are never in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ravectl import files
from ravectl.errors import RavectlError
from ravectl.model import from_json, to_json

VERSION = 1
FOLDER = "rotation"
FILE = "journal.json"
AUDIT = "audit.jsonl"
PREPARED, COMMITTED = "prepared", "committed"


@dataclass(frozen=True)
class Journal:
    """A change under way. Paths are relative to the workspace's folder."""

    version: int
    id: str
    action: str
    who: str
    started: float  # epoch seconds
    phase: str
    names: tuple[str, ...]  # of secrets whose values change
    files: dict[str, str]  # new file -> the place that it takes
    serials: dict[str, int]  # machine -> serial of the bundle that it gets
    changed: dict[str, tuple[str, ...]]  # machine -> files that differ in it


def folder(state: Path) -> Path:
    """Where new files wait, below the workspace's state folder."""
    return state / FOLDER


def read(state: Path) -> Journal | None:
    """The journal of a change that has not ended; RavectlError when it is damaged."""
    path = folder(state) / FILE
    if not path.exists():
        return None
    try:
        found = from_json(Journal, json.loads(path.read_text()))
        known = found.version == VERSION and found.phase in (PREPARED, COMMITTED)
        if not known or not all(_is_ours(*pair) for pair in found.files.items()):
            raise ValueError
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        raise RavectlError(
            f"{path} is damaged, and a change of the secrets was under way",
            f"keep the old secrets: rm -r '{folder(state)}'; then, for each machine that runs: "
            "ravectl down; ravectl up",
        ) from None
    return found


def _is_ours(source: str, target: str) -> bool:
    """Whether a file may take a place: only what waits here, and only where secrets are kept."""
    instance = r"\.rave/instances/[a-z0-9-]{1,32}/secrets\.yaml"
    places = rf"secrets\.yaml|\.sops\.yaml|\.rave/ssh/id_ed25519|{instance}"
    waits = re.fullmatch(r"\.rave/rotation/[a-z0-9_.-]+", source)
    return bool(waits and re.fullmatch(places, target))


def write(state: Path, journal: Journal) -> Journal:
    """Put the journal on disk, durably."""
    files.write_json(folder(state) / FILE, to_json(journal), files.PRIVATE_FILE)
    return journal


def commit(state: Path, journal: Journal) -> Journal:
    """The point of no return: from here on the new files hold."""
    return write(state, replace(journal, phase=COMMITTED))


def settle(root: Path, state: Path) -> None:
    """Put the files of a committed change in their places, as far as that was not done."""
    found = read(state)
    if found is None or found.phase != COMMITTED:
        return
    # without those whose machine was thrown away meanwhile
    there = {s: t for s, t in found.files.items() if (root / t).parent.is_dir()}
    for source, target in there.items():
        if (root / source).exists():
            (root / source).replace(root / target)
    _sync({(root / t).parent for t in there.values()})


def _sync(folders: set[Path]) -> None:
    for path in folders:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def close(state: Path) -> None:
    """Forget a change that has ended: its journal first, then what is left of its files."""
    (folder(state) / FILE).unlink(missing_ok=True)
    files.remove_tree(folder(state))


def log(state: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to the audit log; raises OSError when that cannot be."""
    fd = os.open(state / AUDIT, os.O_RDWR | os.O_CREAT | os.O_APPEND, files.PRIVATE_FILE)
    with os.fdopen(fd, "r+b") as f:
        size = f.seek(0, os.SEEK_END)
        # one that was cut short (by a full disk) must not swallow this one
        begun = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        f.write(b"\n" * begun + json.dumps(entry, sort_keys=True).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def history(state: Path) -> list[dict[str, Any]]:
    """The audit log, oldest first; a line that was cut short is left out."""
    path = state / AUDIT
    rows = []
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("names", []), list):
            rows.append(row)
    return rows
