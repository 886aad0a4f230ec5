"""The command line: verbs, their options and exit codes. No logic lives here."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ravectl import __version__, console
from ravectl.errors import EXIT_FAILED, EXIT_INTERRUPTED, RavectlError

app = typer.Typer(
    name="ravectl",
    help="Build, boot, verify and maintain RAVE machines.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    try:
        app()
    except RavectlError as e:
        console.error(e)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        console.note("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # the reader of our output went away (| head); that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
