"""The schema of the event store, as the migrations that make it.

A migration that was released is never changed: another one is appended.
"""

from __future__ import annotations

import sqlite3

from rave_dispatcher.application.errors import CorruptStoreError

MIGRATIONS = (
    """
    CREATE TABLE events (
      seq INTEGER PRIMARY KEY,
      event_uuid TEXT NOT NULL,
      source TEXT NOT NULL,
      delivery_id TEXT NOT NULL,
      event_type TEXT NOT NULL,
      project TEXT NOT NULL,
      received_ms INTEGER NOT NULL,
      signature TEXT NOT NULL,
      trace_id TEXT NOT NULL,
      span_id TEXT NOT NULL,
      processed INTEGER NOT NULL DEFAULT 0,
      task_id TEXT,
      payload BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX events_delivery ON events (delivery_id, source);
    CREATE UNIQUE INDEX events_uuid ON events (event_uuid);
    CREATE INDEX events_received ON events (received_ms);
    CREATE INDEX events_unprocessed ON events (seq) WHERE processed = 0;

    CREATE TABLE tasks (
      seq INTEGER PRIMARY KEY,
      task_id TEXT NOT NULL UNIQUE,
      event_uuid TEXT,
      agent_type TEXT NOT NULL,
      project TEXT NOT NULL,
      priority INTEGER NOT NULL,
      prompt TEXT NOT NULL,
      trace_id TEXT NOT NULL,
      span_id TEXT NOT NULL,
      status TEXT NOT NULL,
      attempt INTEGER NOT NULL,
      max_attempts INTEGER NOT NULL,
      created_ms INTEGER NOT NULL,
      not_before_ms INTEGER NOT NULL,
      completed_ms INTEGER,
      lease_token TEXT,
      lease_until_ms INTEGER,
      cancel_requested INTEGER NOT NULL DEFAULT 0,
      outcome TEXT,
      detail TEXT NOT NULL DEFAULT '',
      duration_ms INTEGER,
      memory_usage_mb REAL,
      cpu_usage_percent REAL
    ) STRICT;
    CREATE INDEX tasks_waiting ON tasks (project, priority, seq, not_before_ms)
      WHERE status = 'pending';
    CREATE INDEX tasks_running ON tasks (seq) WHERE status = 'running';
    CREATE INDEX tasks_status ON tasks (status, seq);
    CREATE INDEX tasks_completed ON tasks (completed_ms) WHERE completed_ms IS NOT NULL;

    CREATE TABLE task_log (
      task_id TEXT NOT NULL,
      start INTEGER NOT NULL,
      data BLOB NOT NULL,
      PRIMARY KEY (task_id, start)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE spans (
      trace_id TEXT NOT NULL,
      span_id TEXT NOT NULL,
      parent_id TEXT,
      name TEXT NOT NULL,
      start_ns INTEGER NOT NULL,
      end_ns INTEGER NOT NULL,
      ok INTEGER NOT NULL,
      attributes TEXT NOT NULL,
      PRIMARY KEY (trace_id, span_id)
    ) STRICT, WITHOUT ROWID;

    CREATE INDEX spans_end ON spans (end_ns);

    CREATE TABLE metrics (
      seq INTEGER PRIMARY KEY,
      name TEXT NOT NULL,
      value REAL NOT NULL,
      timestamp_ms INTEGER NOT NULL,
      labels TEXT NOT NULL,
      trace_id TEXT
    ) STRICT;
    CREATE INDEX metrics_timestamp ON metrics (timestamp_ms);
    """,
    "ALTER TABLE tasks ADD COLUMN rule TEXT;",
    # who asks for the events of a seldom type need not wait for a walk through all of them
    "CREATE INDEX events_type ON events (event_type, seq);",
)
VERSION = len(MIGRATIONS)
APPLICATION_ID = 0x52415645  # "RAVE": tells our files from others'


def version_of(connection: sqlite3.Connection) -> int:
    """The schema version of a store."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection) -> int:
    """Bring a store to this version; from which one it was. Each migration is all or nothing.

    Raises CorruptStoreError for a store of a newer dispatcher, which we would damage.
    """
    found = version_of(connection)
    if found > VERSION:
        raise CorruptStoreError(
            f"the store is of version {found}, this dispatcher knows {VERSION}: "
            "use the newer dispatcher that wrote it, or restore a backup of before"
        )
    for number, script in enumerate(MIGRATIONS[found:], start=found + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {script} "
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT;"
        )
    return found
