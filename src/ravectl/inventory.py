"""What an image holds, file by file, so that a machine can be held against it.

Written in the mtree(5) format of the BSDs, which bsdtar and mtree read: a path below the image's
root per line, with its type, mode, owner and SHA-256 (or where a link leads), and the capabilities
of a program that has some.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ravectl import files
from ravectl.errors import RavectlError

NAME = "contents.mtree.gz"  # in an image's folder
HEAD = "#mtree"
# Where nothing changes while a machine lives; what is written at all lies elsewhere.
FOLDERS = ("boot", "etc", "opt", "usr")
CAPABILITY = "security.capability"

_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}


@dataclass(frozen=True)
class Entry:
    """A file, a folder or a link. `content` is a file's SHA-256 or a link's target."""

    kind: str
    mode: int
    uid: int
    gid: int
    content: str = ""
    capability: str = ""  # the extended attribute of that name, in hexadecimal


def take(root: Path, folders: Iterable[str] = FOLDERS) -> dict[str, Entry]:
    """Each path below the folders of a root, and the links beside them, from `/`, in order.

    Links are not followed.
    """
    tops = [f"/{top}" for top in folders if (root / top).is_dir()]
    # /bin and /lib lead into /usr
    paths = [*tops, *(f"/{p.name}" for p in root.iterdir() if p.is_symlink())]
    for top in tops:
        for folder, inner, names in os.walk(f"{root}{top}", followlinks=False):
            below = folder.removeprefix(str(root))
            paths += [f"{below}/{name}" for name in (*inner, *names)]
    with ThreadPoolExecutor() as pool:  # hashing does not hold up the others
        entries = pool.map(lambda path: _entry(f"{root}{path}"), paths)
        return dict(sorted(zip(paths, entries, strict=True)))


def _entry(path: str) -> Entry:
    state = os.lstat(path)
    kind = _KINDS.get(stat.S_IFMT(state.st_mode), "other")
    content = capability = ""
    if kind == "file":
        content = files.digest_file(Path(path))
        try:
            capability = os.getxattr(path, CAPABILITY, follow_symlinks=False).hex()
        except OSError:
            capability = ""  # it has none, or the file system knows of none
    elif kind == "link":
        content = os.readlink(path)  # noqa: PTH115
    mode = 0o777 if kind == "link" else stat.S_IMODE(state.st_mode)
    return Entry(kind, mode, state.st_uid, state.st_gid, content, capability)


def dump(entries: Mapping[str, Entry]) -> bytes:
    """The inventory as a file, the same bytes for the same entries."""
    lines = [HEAD, *(_line(path, e) for path, e in sorted(entries.items()))]
    return gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0)


def _line(path: str, entry: Entry) -> str:
    words = [
        f".{_escape(path)}", f"type={entry.kind}", f"mode={entry.mode:o}",
        f"uid={entry.uid}", f"gid={entry.gid}",
    ]  # fmt: skip
    if entry.kind == "file":
        words.append(f"sha256digest={entry.content}")
    if entry.kind == "link":
        words.append(f"link={_escape(entry.content)}")
    if entry.capability:
        words.append(f"xattr.{CAPABILITY}={entry.capability}")
    return " ".join(words)


def _escape(text: str) -> str:
    """As vis(3) does with VIS_OCTAL: what is no printable ASCII, a space, # or \\ by its bytes."""
    plain = re.compile(rb"[!\"$-\[\]-~]")
    raw = os.fsencode(text)
    return "".join(chr(b) if plain.fullmatch(bytes([b])) else f"\\{b:03o}" for b in raw)


def _unescape(text: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), text.encode())
    return os.fsdecode(raw)


def load(path: Path) -> dict[str, Entry]:
    """The entries of an inventory. Raises RavectlError when it cannot be read."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        if lines[:1] != [HEAD]:
            raise ValueError("it is no mtree file")
        return dict(_parse(line) for line in lines[1:])
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as e:
        raise RavectlError(
            f"the inventory {path} cannot be read: {e}", "remove the image and build it again"
        ) from None


def _parse(line: str) -> tuple[str, Entry]:
    name, *words = line.split(" ")
    keys = dict(w.split("=", 1) for w in words)
    content = keys.get("sha256digest") or _unescape(keys.get("link", ""))
    entry = Entry(
        kind=keys["type"], mode=int(keys["mode"], 8), uid=int(keys["uid"]), gid=int(keys["gid"]),
        content=content, capability=keys.get(f"xattr.{CAPABILITY}", ""),
    )  # fmt: skip
    return _unescape(name).removeprefix("."), entry
