"""The command line: verbs, their options and exit codes. No logic lives here.

A module per family of verbs. What a verb needs is imported when it runs, so that `--help`
does not wait for pydantic or paramiko.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from ravectl import __version__, console, errors
from ravectl.cli import access, check, dispatch, image, machine, secret
from ravectl.errors import EXIT_FAILED, EXIT_INTERRUPTED, RavectlError

app = typer.Typer(
    name="ravectl",
    help="Build, boot, verify and maintain RAVE machines.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command()(secret.init)
app.command()(image.profiles)
app.command()(image.plan)
app.command()(image.render)
app.command()(image.lock)
app.command()(image.build)
app.command()(image.gc)
app.add_typer(image.app, name="image")
app.command()(machine.up)
app.command()(machine.down)
app.command()(machine.status)
app.command()(machine.reset)
app.command(context_settings=_PASS_ON)(access.ssh)
app.command("exec", context_settings=_PASS_ON)(access.exec_)
app.command()(access.cp)
app.command()(access.logs)
app.command()(access.console)
app.command()(check.verify)
app.command("rotate-secrets")(secret.rotate_secrets)
app.add_typer(secret.app, name="secrets")
app.add_typer(dispatch.event_app, name="event")
app.command("events", hidden=True)(dispatch.list_events)  # by habit: ravectl events --follow
app.add_typer(dispatch.task_app, name="task")
app.command()(check.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ravectl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say every step, with the commands run.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options that every command understands."""
    console.configure(verbose=verbose)


def main() -> None:
    """Run the command line; the one place where errors become exit codes."""
    _open_streams()
    _protect()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where what goes wrong with it can be told
    except RavectlError as e:
        console.error(e)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        console.note("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # the reader of our output went away (| head); that is its right
        _print_no_more()
        sys.exit(EXIT_FAILED)
    except OSError as e:
        _system_error(e)
    except Exception as e:  # the last resort: a defect must not look like the person's mistake
        _end(e, _defect(e))


def _system_error(e: OSError) -> NoReturn:
    """End by what the system said no to: a file that is in its way is a person's to move."""
    if told := errors.of_file(e):
        _end(e, told)
    if e.errno not in (errno.ENOSPC, errno.EDQUOT):
        _end(e, _defect(e))
    _print_no_more()
    remedy = "give it a place with space, and do it again"
    _end(e, RavectlError(f"what this prints cannot be written: {e.strerror}", remedy))


def _print_no_more() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(e: Exception, told: RavectlError) -> NoReturn:
    console.error(told)
    if console.is_verbose():
        traceback.print_exc()
    sys.exit(EXIT_FAILED)


def _open_streams() -> None:
    """What was closed (`2>&-`) leads to /dev/null: the next file opened would get its number, and
    what is said to a person be written into it."""
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, mode), number)  # also where it is that number already
            os.set_inheritable(number, True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # as Python has it of one that was closed at its start
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _protect() -> None:
    """No core of us, QEMU or sops on a disk; a closed terminal ends us in order, as Ctrl-C does."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    for number in (signal.SIGHUP, signal.SIGTERM):
        # nohup has it ignored
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupted)


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _defect(e: Exception) -> RavectlError:
    # only its kind and place: its text may quote what nobody should read in a log
    last = traceback.extract_tb(e.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119
    return RavectlError(
        f"this is a defect of ravectl: {type(e).__name__} at {where}",
        "report it with the output of the same command under ravectl --verbose",
    )
