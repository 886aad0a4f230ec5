"""The webhook dispatcher: webhooks in, nothing lost, agent tasks out, traced throughout.

    webhook -> verified -> stored durably -> 202
                              |
                              +-> rules -> task -> lease -> agent in a unit -> figures, output

domain/       events, tasks, rules: pure
application/  the use cases and the ports that they need
adapters/     HTTP, signatures, SQLite, systemd, OpenTelemetry, Prometheus
main.py       wires them

Nothing here imports ravectl, nor the other way round: they share the configuration file and
the HTTP API.
"""

__version__ = "1.0.0"
