"""What the launcher tells the dispatcher over their socket: pieces of output, then the result.

A frame is a letter, the length of its content in four bytes (big-endian), and the content:
"b" that it begins, "o" output, "r" the result (JSON).
"""

from __future__ import annotations

import json
import struct
from typing import Any

_HEAD = struct.Struct(">cI")
HEAD_SIZE = _HEAD.size
BEGUN, OUTPUT, RESULT = b"b", b"o", b"r"
MOST = 1 << 20


def pack(kind: bytes, content: bytes) -> bytes:
    """A frame."""
    return _HEAD.pack(kind, len(content)) + content


def unpack_head(head: bytes) -> tuple[bytes, int]:
    """A frame's kind and the length of what follows; ValueError when it is none."""
    kind, size = _HEAD.unpack(head)
    if kind not in (BEGUN, OUTPUT, RESULT) or size > MOST:
        raise ValueError("not a frame of the launcher")
    return kind, size


def result(outcome: str, detail: str, usage: dict[str, Any]) -> bytes:
    """The last frame."""
    return pack(RESULT, json.dumps({"outcome": outcome, "detail": detail, **usage}).encode())
