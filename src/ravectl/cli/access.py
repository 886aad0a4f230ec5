"""Verbs that go into a running machine: ssh, exec, cp, logs, console."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from ravectl.cli import options
from ravectl.console import note
from ravectl.errors import EXIT_FAILED, RavectlError, UsageError

if TYPE_CHECKING:
    from ravectl.instance import Instance

PIECE = 2**16  # bytes


def _running(folder: Path | None, name: str) -> Instance:
    from ravectl.model import InstanceState

    found = options.find_instance(folder, name)
    state = found.state()
    if state is not InstanceState.RUNNING:
        raise RavectlError(f"instance {name!r} is {state.value}", f"start it: {found.verb('up')}")
    return found


def _openssh(found: Instance, program: str, *, port_flag: str) -> list[str]:
    """OpenSSH's client, held to the instance's key and pinned host key and nothing else."""
    from ravectl.command import find_tool

    target = found.target()
    return [
        find_tool(program, "install it: apt-get install openssh-client"),
        "-F", "none",
        "-o", "IdentitiesOnly=yes",
        "-o", f"IdentityFile={target.key_file}",
        *(["-o", f"IdentityFile={coming}"] if (coming := found.next_operator_key()) else []),
        "-o", f"UserKnownHostsFile={found.known_hosts()}",
        "-o", "GlobalKnownHostsFile=none",
        "-o", "StrictHostKeyChecking=yes",
        "-o", "LogLevel=ERROR",
        port_flag, str(target.port),
    ]  # fmt: skip


def ssh(
    context: typer.Context,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Open a shell in the machine, or run a command with a terminal: ravectl ssh -- top."""
    found = _running(workspace, name)
    argv = _openssh(found, "ssh", port_flag="-p")
    # OpenSSH does so for a shell alone; what goes to a file or a pipe is to come as it is
    if context.args and sys.stdin.isatty() and sys.stdout.isatty():
        argv.append("-t")
    argv += [f"{found.target().user}@127.0.0.1", *context.args]
    os.execv(argv[0], argv)  # noqa: S606 - the shell takes our place and our terminal


def exec_(
    context: typer.Context,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds until it is given up, with all of its input.")
    ] = 600.0,
) -> None:
    """Run a command in the machine and exit as it does: ravectl exec -- systemctl status."""
    from ravectl import lifecycle

    if not context.args:
        raise UsageError("exec needs a command", "as in: ravectl exec -- uptime")
    options.require_seconds(timeout, "--timeout")
    found = _running(workspace, name)
    try:
        with lifecycle.connection_to(found) as connection:
            code = connection.relay(
                shlex.join(context.args),
                lambda data: _pass_on(sys.stdout.buffer, data),
                lambda data: _pass_on(sys.stderr.buffer, data),
                stdin=b"" if sys.stdin.isatty() else _piece_of_stdin,
                timeout=timeout,
            )
    except BrokenPipeError:
        raise  # whoever read what we print has ended
    except ConnectionError as e:
        raise RavectlError(f"the machine does not answer: {e}", found.verb("status")) from None
    raise typer.Exit(code if code >= 0 else EXIT_FAILED)


def _piece_of_stdin() -> bytes:
    # not sys.stdin's own buffer: its lock would still be held when we end before the pipe does
    return os.read(sys.stdin.fileno(), PIECE)


def _pass_on(stream: IO[bytes], data: bytes) -> None:
    stream.write(data)
    stream.flush()


def cp(
    source: Annotated[str, typer.Argument(help="A file or folder; in the machine: vm:PATH.")],
    target: Annotated[str, typer.Argument(help="Where to; in the machine: vm:PATH.")],
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Copy between this host and the machine: ravectl cp ./src vm:/home/rave/."""
    if source.startswith("vm:") == target.startswith("vm:"):
        raise UsageError(
            "one of the two paths must be in the machine, the other on this host",
            "as in: ravectl cp notes.txt vm:/home/rave/",
        )
    found = _running(workspace, name)
    argv = [*_openssh(found, "scp", port_flag="-P"), "-r", "-p", "--"]
    for path in (source, target):
        remote = path.startswith("vm:")
        # "./" keeps scp from reading a colon in a local name as a host
        local = path if path.startswith(("/", "./", "../")) else f"./{path}"
        user = found.target().user
        argv.append(f"{user}@127.0.0.1:{path.removeprefix('vm:')}" if remote else local)
    os.execv(argv[0], argv)  # noqa: S606


def logs(
    unit: Annotated[
        str | None, typer.Argument(help="A service of the Plan, or a unit; all if left out.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as lines come, until Ctrl-C.")
    ] = False,
    lines: Annotated[
        str, typer.Option("--lines", "-n", help="How many of the last lines, or all.")
    ] = "100",
    since: Annotated[
        str | None,
        typer.Option("--since", "-S", help="From then on: -1h, today, a time (UTC)."),
    ] = None,
    until: Annotated[str | None, typer.Option("--until", "-U", help="Up to then.")] = None,
    priority: Annotated[
        str | None, typer.Option("--priority", "-p", help="This and worse: err, warning, info ...")
    ] = None,
    grep: Annotated[
        str | None, typer.Option("--grep", "-g", help="Only messages that match (PCRE).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="An object per entry, with every field.")
    ] = False,
    name: Annotated[
        str, typer.Option("--name", envvar="RAVECTL_NAME", help="Which instance, of several.")
    ] = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show the machine's journal; of a machine that is not running, its console.

    The short options are journalctl's, so here -n is --lines. Times are the machine's: UTC.
    """
    from ravectl import logs as journal
    from ravectl.model import InstanceState

    found = options.find_instance(workspace, name)
    # with a time, all of it is meant, as with journalctl
    given = "all" if lines == "100" and since and not follow else lines
    query = journal.Query(
        lines=_lines(given), follow=follow, since=since, until=until, priority=priority, grep=grep,
        as_json=as_json,
    )  # fmt: skip
    if found.state() is not InstanceState.RUNNING:
        journal.check(query)
        note(f"{name} is not running; this is the end of its console")
        _print_console(found, 10_000 if query.lines is None else query.lines)
        return
    if unit is not None:
        query = replace(query, unit=journal.find_unit(found, unit))
    with options.until_interrupted() if follow else contextlib.nullcontext():
        journal.show(found, query, _put, options.say_lost)


def _lines(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(
            f"{text!r} is not a number of lines",
            "write a number, or all; the instance is named by --name",
        )
    return int(text)


def _print_console(found: Instance, lines: int) -> None:
    if lines:
        print(found.console_tail(lines))


def _put(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def console(
    lines: Annotated[int, typer.Option("--lines", help="How many of the last lines.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show what the machine wrote to its serial console, also after it died."""
    from ravectl.command import find_tool

    if lines < 0:
        raise UsageError(f"{lines} is not a number of lines", "write one from 0 on: --lines 200")
    found = options.find_instance(workspace, name)
    _print_console(found, lines)
    if follow:
        argv = [find_tool("tail"), "--lines=0", "--follow=name", str(found.console_log)]
        sys.stdout.flush()
        os.execv(argv[0], argv)  # noqa: S606
