"""Verbs that go into a running machine: ssh, exec, cp, logs, console."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from ravectl.cli import options
from ravectl.console import note
from ravectl.errors import EXIT_FAILED, RavectlError, UsageError

if TYPE_CHECKING:
    from ravectl.instance import Instance


def _running(folder: Path | None, name: str) -> Instance:
    from ravectl.model import InstanceState

    found = options.find_instance(folder, name)
    state = found.state()
    if state is not InstanceState.RUNNING:
        raise RavectlError(f"instance {name!r} is {state.value}", "start it: ravectl up")
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
    """Open a shell in the machine, or run a command with a terminal: ravectl ssh -- htop."""
    found = _running(workspace, name)
    argv = _openssh(found, "ssh", port_flag="-p")
    argv += [f"{found.target().user}@127.0.0.1", *context.args]
    os.execv(argv[0], argv)  # noqa: S606 - the shell takes our place and our terminal


def exec_(
    context: typer.Context,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
    timeout: Annotated[float, typer.Option(help="Seconds until it is given up.")] = 600.0,
) -> None:
    """Run a command in the machine and exit as it does: ravectl exec -- systemctl status."""
    from ravectl import lifecycle

    if not context.args:
        raise UsageError("exec needs a command", "as in: ravectl exec -- uptime")
    found = _running(workspace, name)
    stdin = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
    try:
        with lifecycle.connection_to(found) as connection:
            code = connection.relay(
                shlex.join(context.args),
                lambda data: _pass_on(sys.stdout.buffer, data),
                lambda data: _pass_on(sys.stderr.buffer, data),
                stdin=stdin,
                timeout=timeout,
            )
    except ConnectionError as e:
        raise RavectlError(f"the machine does not answer: {e}", "ravectl status") from None
    raise typer.Exit(code if code >= 0 else EXIT_FAILED)


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
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("--lines", help="How many of the last lines.")] = 100,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show the machine's journal; of a machine that is not running, its console."""
    from ravectl.model import InstanceState

    found = options.find_instance(workspace, name)
    if found.state() is not InstanceState.RUNNING:
        note(f"{name} is not running; this is the end of its console")
        print(found.console_tail(lines))
        return
    argv = _openssh(found, "ssh", port_flag="-p")
    command = ["sudo", "journalctl", "--no-pager", "--lines", str(lines)]
    if unit is not None:
        command += ["--unit", _unit(found, unit)]
    if follow:
        command.append("--follow")
    argv += [f"{found.target().user}@127.0.0.1", shlex.join(command)]
    os.execv(argv[0], argv)  # noqa: S606


def _unit(found: Instance, name: str) -> str:
    """The unit of a service of the Plan, else the name as it is."""
    record = found.record
    if record is None:
        return name
    for service in record.plan.services:
        if service.name == name:
            return service.unit[record.engine.value]
    return name


def console(
    lines: Annotated[int, typer.Option("--lines", help="How many of the last lines.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show what the machine wrote to its serial console, also after it died."""
    from ravectl.command import find_tool

    found = options.find_instance(workspace, name)
    print(found.console_tail(lines))
    if follow:
        argv = [find_tool("tail"), "--lines=0", "--follow=name", str(found.console_log)]
        sys.stdout.flush()
        os.execv(argv[0], argv)  # noqa: S606
