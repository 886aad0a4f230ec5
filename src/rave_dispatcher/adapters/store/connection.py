"""Opening the store, and telling whether it is sound."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from rave_dispatcher.adapters.store import schema
from rave_dispatcher.application.errors import (
    CorruptStoreError,
    DispatcherError,
    StorageFullError,
    StoreError,
)

LOG_BYTES = 100 * 2**20
BUSY_MS = 5000
CHECK_SECONDS = 0.5  # of the start; what takes longer goes on beside the work
_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
RESTORE = (
    "the event store {path} is damaged ({why}). Nothing was changed. To restore: stop the "
    "dispatcher, move {path} and its -wal and -shm files aside, copy the newest good backup "
    "(made by: rave-dispatcher backup FILE) to {path}, start the dispatcher. What the damaged "
    "file still holds: rave-dispatcher export --store FILE"
)


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection with the settings that the promises rest on."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA cache_size = -4096")
    connection.execute("PRAGMA synchronous = FULL")
    if read_only:
        connection.execute("PRAGMA query_only = ON")
        return connection
    if schema.version_of(connection) == 0:
        # what retention frees goes back to the disk; can only be chosen while it is empty
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StoreError(f"the store's journal mode is {mode}: its file system cannot do WAL")
    # a log that grew is cut to this when it begins anew
    connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # maintenance does it beside the commits
    return connection


def open_store(path: Path) -> sqlite3.Connection:
    """The writer's connection to a sound, current store; made if there is none.

    Raises CorruptStoreError, which says how to restore, and StorageFullError.
    """
    connection = None
    try:
        connection = connect(path)
        found = check(connection, seconds=CHECK_SECONDS)
        if found is not None:
            raise CorruptStoreError(RESTORE.format(path=path, why=found))
        schema.migrate(connection)
    except sqlite3.Error as e:
        if connection is not None:
            connection.close()
        if is_corrupt(e):
            raise CorruptStoreError(RESTORE.format(path=path, why=str(e))) from None
        raise translate(e) from None
    except CorruptStoreError:
        if connection is not None:
            connection.close()
        raise
    return connection


def check(connection: sqlite3.Connection, seconds: float | None = None) -> str | None:
    """What is wrong with a store, or None. With `seconds`, only as far as one gets in them."""
    end = None if seconds is None else time.monotonic() + seconds
    if end is not None:
        connection.set_progress_handler(lambda: int(time.monotonic() > end), 10_000)
    try:
        # the whole of it without a limit; the quicker one leaves out indices against tables
        pragma = "integrity_check" if end is None else "quick_check"
        rows = connection.execute(f"PRAGMA {pragma}(1)").fetchall()
    except sqlite3.OperationalError as e:
        if e.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            return None
        raise
    finally:
        connection.set_progress_handler(None, 0)
    return None if rows == [("ok",)] else str(rows[0][0]) if rows else "no answer"


def is_corrupt(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file is damaged."""
    return (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF in _CORRUPT


def is_full(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the disk is full, in one of its ways."""
    code = getattr(error, "sqlite_errorcode", 0) or 0
    # the shared-memory index cannot grow either, and is reported as an I/O error
    return code & 0xFF == sqlite3.SQLITE_FULL or code in (
        sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMMAP,
    )  # fmt: skip


def concerns_all(error: sqlite3.Error) -> bool:
    """Whether it is the store that failed, and not one statement in it."""
    code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
    return is_corrupt(error) or code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def translate(error: sqlite3.Error) -> DispatcherError:
    """What a client is told; SQLite's own words may quote a statement, never a value."""
    if is_full(error):
        return StorageFullError("there is no space left for events: deliver this again later")
    name = getattr(error, "sqlite_errorname", None) or type(error).__name__
    return StoreError(f"the event store cannot be used now ({name}): deliver this again later")


def free_bytes(path: Path) -> int:
    """Space that is left where the store is."""
    with contextlib.suppress(OSError):
        state = os.statvfs(path.parent)
        return state.f_bavail * state.f_frsize
    return 0
