"""Wires the dispatcher together, and its commands:

serve      the service
launcher   root's side of an agent task (started by systemd for each)
check      the store's settings and its integrity, as JSON
prune      delete what is older than the retention
export     events and tasks as lines of JSON
backup     a sound copy of the store, also of one in use
openapi    the API's description
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import json
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rave_dispatcher import __version__
from rave_dispatcher.adapters.store import connection
from rave_dispatcher.application.errors import CorruptStoreError, DispatcherError
from rave_dispatcher.config import Config, ConfigError, load

if TYPE_CHECKING:
    from rave_dispatcher.adapters.systemd import Notifier, Sockets
    from rave_dispatcher.service import Service

DEFAULT_CONFIG = Path("/etc/rave/dispatcher.yaml")
EXIT_FAILED, EXIT_USAGE, EXIT_CORRUPT = 1, 2, 4


def main(words: list[str] | None = None) -> int:
    """The command line; its exit code."""
    arguments = _parser().parse_args(words)
    try:
        return int(arguments.run(arguments))
    except ConfigError as e:
        print(f"rave-dispatcher: {e}", file=sys.stderr)
        return EXIT_USAGE
    except CorruptStoreError as e:
        print(f"rave-dispatcher: {e}", file=sys.stderr)
        return EXIT_CORRUPT
    except DispatcherError as e:
        print(f"rave-dispatcher: {e.detail}", file=sys.stderr)
        return EXIT_FAILED
    except sqlite3.Error as e:
        print(f"rave-dispatcher: the event store cannot be read: {e}", file=sys.stderr)
        return EXIT_CORRUPT if connection.is_corrupt(e) else EXIT_FAILED
    except OSError as e:
        print(f"rave-dispatcher: {e.filename or ''} {e.strerror}".strip(), file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rave-dispatcher", description="The webhook dispatcher.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="its configuration")
    verbs = parser.add_subparsers(required=True)
    for name, run, help_ in (
        ("serve", _serve, "run the service"),
        ("launcher", _launcher, "carry out one agent task (for systemd)"),
        ("check", _check, "the store's settings and integrity"),
        ("prune", _prune, "delete what is older than the retention"),
        ("export", _export, "events and tasks as lines of JSON"),
        ("backup", _backup, "a copy of the store"),
        ("openapi", _openapi, "the API's description"),
    ):
        verb = verbs.add_parser(name, help=help_)
        verb.set_defaults(run=run)
        if name in ("check", "export"):
            verb.add_argument("--store", type=Path, help="another file than the configured one")
        if name == "export":
            verb.add_argument("--since", type=_moment, default=0, help="seconds of the epoch")
        if name == "backup":
            verb.add_argument("file", type=Path)
    return parser


def _moment(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < 1e11:  # NaN is in no order
        raise ValueError
    return seconds


# --- serve -----------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> int:
    import uvloop  # noqa: PLC0415

    from rave_dispatcher.adapters import logs  # noqa: PLC0415
    from rave_dispatcher.adapters.systemd import (  # noqa: PLC0415
        Notifier,
        bind,
        bind_private,
        inherited_sockets,
    )

    config = load(arguments.config)
    # the journal marks its own stream; a person or a test reads plain JSON
    logs.configure(journal="JOURNAL_STREAM" in os.environ)
    # the writer's thread must not wait 5 ms for its turn after each commit
    sys.setswitchinterval(0.0005)
    with _only_one(config.store.path):
        sockets = inherited_sockets()
        if not sockets.api:
            sockets.api.append(bind(config.listen.host, config.listen.port))
        if not sockets.console and config.console.socket:
            sockets.console.append(bind_private(config.console.socket))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_service(config, sockets, Notifier()))


@contextlib.contextmanager
def _only_one(store: Path) -> Iterator[None]:
    """Hold the store's lock; waits for a predecessor that is still draining."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.with_name(store.name + ".lock").open("w") as f:
        end = time.monotonic() + 5
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DispatcherError(f"another dispatcher uses {store}") from None
                time.sleep(0.05)
        yield


async def _service(config: Config, sockets: Sockets, notifier: Notifier) -> int:
    from rave_dispatcher.service import Service  # noqa: PLC0415

    service = await Service.start(config, notifier)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    # what was made until now stays: the collector need not look at it again
    gc.collect()
    gc.freeze()
    return await _run(service, sockets)


async def _run(service: Service, sockets: Sockets) -> int:
    try:
        return await service.run(sockets)
    finally:
        await service.close()


# --- the rest --------------------------------------------------------------------------------


def _launcher(arguments: argparse.Namespace) -> int:
    from rave_dispatcher.adapters.runners import launcher  # noqa: PLC0415

    # with Accept=yes systemd hands the connection over as standard input
    launcher.serve(socket.socket(fileno=os.dup(0)), load(arguments.config))
    return 0


def _existing(path: Path) -> Path:
    if not path.is_file():  # SQLite would make one
        raise DispatcherError(f"there is no store {path}")
    return path


def _check(arguments: argparse.Namespace) -> int:
    from rave_dispatcher.adapters.store import maintenance  # noqa: PLC0415

    path = _existing(arguments.store or load(arguments.config).store.path)
    found = maintenance.describe(path)
    print(json.dumps(found))
    return 0 if found["integrity_check"] == "ok" else EXIT_CORRUPT


def _prune(arguments: argparse.Namespace) -> int:
    from rave_dispatcher.adapters.store import maintenance  # noqa: PLC0415

    config = load(arguments.config)
    before = int((time.time() - config.store.retention_days * 86400) * 1000)
    path = _existing(config.store.path)
    print(f"{maintenance.prune_offline(path, before)} rows deleted")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from rave_dispatcher.adapters.store import maintenance  # noqa: PLC0415

    path = _existing(arguments.store or load(arguments.config).store.path)
    skipped: list[str] = []
    for line in maintenance.export(path, int(arguments.since * 1000), skipped.append):
        print(line)
    for what in skipped:
        print(f"rave-dispatcher: {what}", file=sys.stderr)
    return EXIT_CORRUPT if skipped else 0


def _backup(arguments: argparse.Namespace) -> int:
    from rave_dispatcher.adapters.store import maintenance  # noqa: PLC0415

    maintenance.backup(_existing(load(arguments.config).store.path), arguments.file)
    return 0


def _openapi(_: argparse.Namespace) -> int:
    from rave_dispatcher.service import openapi_document  # noqa: PLC0415

    print(openapi_document())
    return 0


if __name__ == "__main__":
    sys.exit(main())
