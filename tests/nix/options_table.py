#!/usr/bin/env python3
"""Write options.json: the NixOS options that the rendered modules set, with the types they have.

    python -m tests.nix.options_table OPTIONS RELEASE

OPTIONS is the list of every option of a NixOS release, as its manual is made from
(share/doc/nixos/options.json, or the same gzipped); RELEASE says which it is. Rows that it does
not have, such as those of sops-nix, are kept as they are.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

from tests import nixos

TABLE = Path(__file__).resolve().parent / "options.json"


def read(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    rows = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    return {
        re.sub(r"\b_name_\b", "<name>", name).replace("._.", ".*."): row["type"]
        if isinstance(row, dict)
        else row[0]
        for name, row in rows.items()
    }


def used(known: dict[str, str], value: Any, at: str = "") -> set[str]:
    """The names of the options that `value` sets, as far down as they are declared."""
    if at in known and not any(n.startswith(f"{at}.") for n in known):
        return {at}
    found = {at} if at in known else set()
    children = value.items() if isinstance(value, dict) else ()
    for key, child in children:
        for name in (key, "<name>"):
            below = f"{at}.{name}".lstrip(".")
            if below in known or any(n.startswith(f"{below}.") for n in known):
                found |= used(known, child, below)
                break
    if isinstance(value, list):
        for child in value:
            found |= used(known, child, f"{at}.*")
    return found


def main(path: str, release: str) -> None:
    known = read(Path(path))
    names: set[str] = set()
    for plan in nixos.shipped():
        names |= used(known, nixos.values(plan.hostname))
    old = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    kept = {n: row for n, row in old.items() if n.startswith("sops.")}
    rows = {n: {"type": known[n], "release": release} for n in names if not n.startswith("sops.")}
    body = ",\n".join(
        f"  {json.dumps(n)}: {json.dumps(row, ensure_ascii=False)}"
        for n, row in sorted({**kept, **rows}.items())
    )
    TABLE.write_text(f"{{\n{body}\n}}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
