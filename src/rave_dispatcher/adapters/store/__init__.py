"""The event store: SQLite in WAL mode, one writer that commits in groups."""
