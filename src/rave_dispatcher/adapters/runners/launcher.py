"""The launcher: root's side of a task. systemd starts one for each connection to its socket.

Small on purpose: it takes an order, holds it against the configuration, starts a unit, passes
its output on, and says how it ended. When the dispatcher hangs up it ends the unit, with all
processes in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pwd
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from rave_dispatcher.adapters.runners import frames
from rave_dispatcher.adapters.runners.unit import (
    DENIED_MOST,
    SLICE,
    STOP_SECONDS,
    Order,
    denied_processes,
    is_over,
    parse_show,
    show_argv,
    systemd_run_argv,
    verdict,
)
from rave_dispatcher.config import Agent, Config
from rave_dispatcher.domain.rules import MAX_PROMPT
from rave_dispatcher.domain.tasks import Outcome, Usage

RUN = Path("/run/rave-launcher")
CGROUPS = Path("/sys/fs/cgroup")
HEAD_MOST = 4096
ORDER_SECONDS = 10.0
SLOW_SECONDS = 120.0  # a dispatcher that takes no output for so long is stuck
POLL_SECONDS = 0.25
COMMAND_SECONDS = 30.0
FORMER_SECONDS = 2.0 * STOP_SECONDS


class RefusedError(Exception):
    """An order that is not carried out."""


class HungUpError(Exception):
    """The dispatcher does not want the task any more, or is gone."""


def read_order(connection: socket.socket) -> tuple[Order, bytes]:
    """What is asked; RefusedError when it has not the form of an order."""
    connection.settimeout(ORDER_SECONDS)
    data = b""
    while b"\n" not in data:
        data += _receive(connection, data)
        if len(data) > HEAD_MOST + MAX_PROMPT * 4:
            raise RefusedError("the order is too long")
    head, _, prompt = data.partition(b"\n")
    try:
        fields = json.loads(head)
        size = int(fields.pop("prompt_bytes"))
        order = Order(**fields)
        fault = order.fault()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RefusedError("the order is not of its form") from None
    if fault or not 0 <= size <= MAX_PROMPT * 4:
        raise RefusedError(fault or "the prompt is too long")
    while len(prompt) < size:
        prompt += _receive(connection, prompt)
    return order, prompt[:size]


def _receive(connection: socket.socket, _: bytes) -> bytes:
    try:
        piece = connection.recv(65536)
    except TimeoutError:
        raise RefusedError("the order did not come in time") from None
    if not piece:
        raise HungUpError
    return piece


def find_agent(config: Config, order: Order) -> Agent:
    """The agent that is configured for an order; RefusedError when there is none."""
    if order.rule is not None and not config.has_rule(order.rule):
        raise RefusedError(f"its rule {order.rule!r} is gone")
    found = config.agent(order.agent_type, order.rule)
    if found is None:
        raise RefusedError(f"no command is configured for {order.agent_type[:40]!r}")
    return found


def serve(connection: socket.socket, config: Config) -> None:
    """Carry out the one order of a connection."""
    began = time.monotonic()
    try:
        order, prompt = read_order(connection)
        agent = find_agent(config, order)
        # from here on it is this task that fails, and not each
        connection.sendall(frames.pack(frames.BEGUN, b""))
        with _alone(order.task_id):
            outcome, detail, usage = _carry_out(connection, config, order, agent, prompt)
    except (HungUpError, ConnectionError):
        return
    except (RefusedError, subprocess.TimeoutExpired) as e:
        if not isinstance(e, RefusedError):  # its text is a command line
            e = RefusedError("systemd did not answer in time")
        spent = int((time.monotonic() - began) * 1000)
        outcome, detail, usage = Outcome.NOT_STARTED, str(e), Usage(spent, None, None)
    with contextlib.suppress(OSError):
        connection.settimeout(ORDER_SECONDS)
        connection.sendall(frames.result(outcome.value, detail, dataclasses.asdict(usage)))


def _carry_out(
    connection: socket.socket, config: Config, order: Order, agent: Agent, prompt: bytes
) -> tuple[Outcome, str, Usage]:
    folder = RUN / order.task_id
    workdir = config.runner.home / "tasks" / order.task_id
    if folder.exists():  # of a launcher that was killed: its unit may run on
        _end(order.unit)
    try:
        _prepare(folder, config.runner.home, order.task_id, config.runner.user, prompt)
        # opened for both, so that it has a reader before the unit opens it, and no end between
        fifo = os.open(folder / "output", os.O_RDWR | os.O_NONBLOCK)
        try:
            argv = systemd_run_argv(
                order, agent, config.runner.user, str(workdir), str(folder / "prompt"),
                str(folder / "output"),
                # systemd's own is no help where programs lie elsewhere (NixOS), whose unit says it
                os.environ.get("PATH"),
            )  # fmt: skip
            began = time.monotonic()
            started = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_SECONDS,
                check=False,
            )  # fmt: skip
            if started.returncode != 0:
                shown = parse_show(_show(order.unit))
                if not is_over(shown) or shown.get("Result", "success") == "success":
                    raise RefusedError("systemd did not start the unit: see the journal")
            shown = _follow(connection, fifo, order.unit)
            return verdict(shown, int((time.monotonic() - began) * 1000))
        finally:
            os.close(fifo)
    finally:
        _end(order.unit)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _alone(task_id: str) -> Iterator[None]:
    """Wait until a former attempt's launcher is done: it stops the unit and removes the files that
    have the same names as ours."""
    RUN.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = RUN / f"{task_id}.lock"
    end = time.monotonic() + FORMER_SECONDS
    while True:
        with path.open("w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RefusedError("the former attempt does not end") from None
                time.sleep(0.05)
                continue
            if os.fstat(f.fileno()).st_nlink == 0:  # removed by who had it before us
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _prepare(folder: Path, home: Path, task_id: str, user: str, prompt: bytes) -> None:
    who = pwd.getpwnam(user)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    _make_workdir(home, task_id, who)
    (folder / "prompt").write_bytes(prompt)
    os.mkfifo(folder / "output", 0o600)


def _make_workdir(home: Path, task_id: str, who: pwd.struct_passwd) -> None:
    """The task's folder, or a former attempt's: agents may go on with what they have.

    All above it is the agent's, who may put a link where a folder was: root follows none.
    """
    at = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in ("tasks", task_id):
            made = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=at)
                made = True
            try:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            except OSError:
                raise RefusedError("the task's folder is no folder") from None
            os.close(at)
            at = below
            if made:
                os.fchown(at, who.pw_uid, who.pw_gid)
    finally:
        os.close(at)


def _follow(connection: socket.socket, fifo: int, unit: str) -> dict[str, str]:
    """Pass output on until the unit is over; HungUpError when nobody listens any more."""
    connection.settimeout(SLOW_SECONDS)
    next_look = 0.0
    while True:
        ready, _, _ = select.select([fifo, connection.fileno()], [], [], POLL_SECONDS)
        if connection.fileno() in ready and not _still_there(connection):
            raise HungUpError
        if fifo in ready:
            _pass_on(connection, fifo)
        if time.monotonic() >= next_look:
            shown = parse_show(_show(unit))
            next_look = time.monotonic() + POLL_SECONDS
            if is_over(shown):
                _pass_on(connection, fifo)
                return shown
            if _is_fork_bomb(unit):
                _pass_on(connection, fifo)
                return {**shown, "Result": "fork-bomb"}


def _is_fork_bomb(unit: str) -> bool:
    try:
        events = (CGROUPS / SLICE / unit / "pids.events").read_text()
    except OSError:  # it has just ended, or the kernel does not count
        return False
    return denied_processes(events) > DENIED_MOST


def _still_there(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1024, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _pass_on(connection: socket.socket, fifo: int) -> None:
    try:
        while data := os.read(fifo, 65536):
            connection.sendall(frames.pack(frames.OUTPUT, data))
    except BlockingIOError:
        return  # no more for now
    except OSError:
        raise HungUpError from None


def _show(unit: str) -> str:
    return subprocess.run(
        show_argv(unit), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=COMMAND_SECONDS, check=False,
    ).stdout  # fmt: skip


def _end(unit: str) -> None:
    """Stop a unit with all its processes, and have systemd forget it."""
    for verb in ("stop", "reset-failed"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["systemctl", verb, unit], stdin=subprocess.DEVNULL, capture_output=True,
                timeout=COMMAND_SECONDS, check=False,
            )  # fmt: skip
