"""Identifiers that sort by the time at which they were made (UUID version 7, RFC 9562).

Random ones would touch another page of the store's index with each insert.
"""

from __future__ import annotations

import uuid


def make_uuid(now_ms: int, randomness: bytes) -> str:
    """A UUIDv7 of a time (milliseconds of the epoch) and ten random bytes."""
    value = (now_ms & ((1 << 48) - 1)) << 80 | int.from_bytes(randomness[:10], "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))
