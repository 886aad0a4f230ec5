"""An empty PostgreSQL cluster that is the same to the bit whenever it is made.

`initdb` at first boot would cost many seconds under TCG, so the cluster is part of the image.
Of two clusters made alike only three things differ (measured, docs/adr/0004): `pg_control`,
the statistics, the WAL. The statistics go; pg_resetwal makes one new WAL segment; and the
identifier, the nonce and the two time stamps are set here, with their CRC-32C.

Offsets follow src/include/catalog/pg_control.h and access/xlogrecord.h of PostgreSQL 17.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from ravectl import command
from ravectl.errors import RavectlError

MAJOR = "17"
CONTROL_VERSION = 1700  # PG_CONTROL_VERSION of PostgreSQL 17
IDENTIFIER, CONTROL_TIME, CHECKPOINT, NONCE, CONTROL_CRC = 0, 24, 40, 256, 288
CHECKPOINT_TIME = 64  # within CheckPoint
RECORD = 40  # the first record of a segment follows a long page header of 40 bytes
RECORD_CRC, RECORD_DATA = 20, 24  # within a record


def make_cluster(root: Path, epoch: int) -> None:
    """Make the cluster `main` in the Debian root `root`; it is not started.

    `epoch` (seconds) is the time it claims. Raises RavectlError when PostgreSQL's format is
    another than the one known here.
    """
    data = root / f"var/lib/postgresql/{MAJOR}/main"
    script = (
        "mount -t proc proc /proc && mount -t tmpfs tmpfs /dev/shm && "
        f"pg_createcluster {MAJOR} main --locale C.UTF-8 -- --data-checksums --no-sync "
        "--auth-local=peer --auth-host=scram-sha-256 --wal-segsize=1"
    )
    _inside(root, script)
    (data / "pg_stat/pgstat.stat").unlink(missing_ok=True)
    _set_identity(data / "global/pg_control", epoch)
    _inside(root, f"su postgres -s /bin/sh -c '{_bin('pg_resetwal')} -f {_in(root, data)}'")
    _set_identity(data / "global/pg_control", epoch)
    segments = [p for p in (data / "pg_wal").iterdir() if p.is_file()]
    if len(segments) != 1:
        raise RavectlError(f"pg_resetwal left {len(segments)} WAL segments, not one", "report it")
    _set_record_time(segments[0], epoch)
    checked = _inside(root, f"{_bin('pg_controldata')} {_in(root, data)}")
    if "WARNING" in checked:
        raise RavectlError("the prepared PostgreSQL cluster has a wrong checksum", "report it")


def _bin(name: str) -> str:
    return f"/usr/lib/postgresql/{MAJOR}/bin/{name}"


def _in(root: Path, path: Path) -> str:
    return f"/{path.relative_to(root)}"


def _inside(root: Path, script: str) -> str:
    result = command.run(
        command.isolated(["chroot", root, "/bin/sh", "-c", script]),
        env={"PATH": os.defpath + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"},
    )
    return result.stdout + result.stderr


def _set_identity(control: Path, epoch: int) -> None:
    raw = bytearray(control.read_bytes())
    version = struct.unpack_from("<I", raw, 8)[0]
    known = struct.unpack_from("<I", raw, CONTROL_CRC)[0] == crc32c(raw[:CONTROL_CRC])
    if version != CONTROL_VERSION or not known:
        raise RavectlError(
            f"pg_control has version {version} or a layout that ravectl does not know",
            f"ravectl makes clusters of PostgreSQL {MAJOR}: check what the mirror serves",
        )
    # as PostgreSQL makes it: seconds in the upper half; the lower half says whose it is
    struct.pack_into("<Q", raw, IDENTIFIER, epoch << 32 | 0x52415645)
    struct.pack_into("<q", raw, CONTROL_TIME, epoch)
    struct.pack_into("<q", raw, CHECKPOINT + CHECKPOINT_TIME, epoch)
    raw[NONCE:CONTROL_CRC] = bytes(CONTROL_CRC - NONCE)
    struct.pack_into("<I", raw, CONTROL_CRC, crc32c(raw[:CONTROL_CRC]))
    control.write_bytes(raw)


def _set_record_time(segment: Path, epoch: int) -> None:
    raw = bytearray(segment.read_bytes())
    length = struct.unpack_from("<I", raw, RECORD)[0]
    end = RECORD + length
    if struct.unpack_from("<I", raw, RECORD + RECORD_CRC)[0] != _record_crc(raw, end):
        raise RavectlError(
            "the WAL of the prepared PostgreSQL cluster has a layout that ravectl does not know",
            f"ravectl makes clusters of PostgreSQL {MAJOR}: check what the mirror serves",
        )
    # the data follows a two-byte header (its id and its length)
    struct.pack_into("<q", raw, RECORD + RECORD_DATA + 2 + CHECKPOINT_TIME, epoch)
    struct.pack_into("<I", raw, RECORD + RECORD_CRC, _record_crc(raw, end))
    segment.write_bytes(raw)


def _record_crc(raw: bytearray, end: int) -> int:
    """A record's CRC runs over its data first, then over its header up to the CRC."""
    data = raw[RECORD + RECORD_DATA : end]
    return crc32c(bytes(data) + bytes(raw[RECORD : RECORD + RECORD_CRC]))


def crc32c(data: bytes | bytearray) -> int:
    """CRC-32C (Castagnoli, RFC 3720), which PostgreSQL uses; for a few hundred bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
