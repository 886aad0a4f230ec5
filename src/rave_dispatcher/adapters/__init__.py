"""The outside: HTTP, signatures, SQLite, systemd, OpenTelemetry, Prometheus."""
