"""Options that several verbs share, and what they resolve to."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ravectl.errors import UsageError

if TYPE_CHECKING:
    from ravectl import reconnect, sops
    from ravectl.instance import Instance
    from ravectl.model import Plan
    from ravectl.profile import Profile
    from ravectl.workspace import Workspace

DEFAULT_NAME = "default"
MAX_SECONDS = 1e6  # eleven days; poll(2) takes no more than twice that

Name = Annotated[
    str, typer.Option("--name", "-n", envvar="RAVECTL_NAME", help="Which instance, of several.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--workspace", envvar="RAVECTL_WORKSPACE",
        help="The workspace's folder; else the nearest one with rave.yaml or .rave.",
    ),
]  # fmt: skip
Safe = Annotated[bool, typer.Option("--safe", help="The profile safe: 2 GB (default).")]
FullPipe = Annotated[bool, typer.Option("--full-pipe", help="The profile full-pipe: 4 GB.")]
ProfileName = Annotated[
    str | None, typer.Option("--profile", "-p", help="A profile by name: see ravectl profiles.")
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine", envvar="RAVECTL_ENGINE", help="nix, debian, or auto: nix where it can build."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


def find_workspace(folder: Path | None) -> Workspace:
    """The workspace that the options and the current folder name."""
    from ravectl import workspace

    return workspace.find(override=folder)


def profile_flag(safe: bool, full_pipe: bool, name: str | None) -> str | None:
    """The one profile that the flags name; UsageError when they name several."""
    asked = [n for n, on in (("safe", safe), ("full-pipe", full_pipe), (name, name)) if on and n]
    if len(set(asked)) > 1:
        raise UsageError(
            f"these options name several profiles: {', '.join(asked)}",
            "give one of --safe, --full-pipe and --profile",
        )
    return asked[0] if asked else None


def select_profile(flag: str | None, workspace: Workspace) -> Profile:
    """The profile asked for."""
    from ravectl import profile

    return profile.select(flag, os.environ, workspace.profile_file)


def make_plan(flag: str | None, workspace: Workspace) -> Plan:
    """The Plan of the profile asked for."""
    from ravectl import plan

    return plan.make_plan(**select_profile(flag, workspace).plan_arguments())


def plan_asked(safe: bool, full_pipe: bool, name: str | None, workspace: Workspace) -> Plan:
    """The Plan of the profile that the flags name, else of the workspace's own."""
    return make_plan(profile_flag(safe, full_pipe, name), workspace)


def find_instance(folder: Path | None, name: str) -> Instance:
    """The instance `name` of the workspace; RavectlError when it was never brought up."""
    from ravectl.errors import RavectlError
    from ravectl.instance import Instance
    from ravectl.model import InstanceState

    found = Instance(find_workspace(folder).instance_dir(name), name)
    if found.state() is InstanceState.ABSENT:
        suffix = "" if name == DEFAULT_NAME else f" --name {name}"
        raise RavectlError(f"there is no instance {name!r} here", f"make it: ravectl up{suffix}")
    return found


def opener(workspace: Workspace, override: Path | None = None) -> sops.Identity:
    """The age identity by which this workspace's secrets are opened."""
    from ravectl import sops

    return sops.find_identity(override, workspace.identity_file)


def require_seconds(value: float, option: str) -> None:
    """Raise UsageError for what is no time to wait: inf, nan, or less than nothing."""
    if not 0 <= value <= MAX_SECONDS:  # also false of nan
        raise UsageError(
            f"{option} {value:g} is no time to wait",
            f"give seconds, from 0 to {MAX_SECONDS:g}: {option} 60",
        )


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """For what only Ctrl-C ends: that is then no failure, as with top and journalctl."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def say_lost(why: reconnect.Lost) -> None:
    """Tell of a lost connection: once, not at each attempt."""
    from ravectl import console
    from ravectl.verify.framework import clean

    if why.attempts == 0:
        console.note(f"no connection ({clean(why.reason)}); trying until it is back")


def print_json(value: Any) -> None:
    """Print a value of the model as JSON."""
    from ravectl.model import to_json

    print(json.dumps(to_json(value), indent=2))
