"""Verbs of secrets: init, secrets ..., rotate-secrets."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ravectl import console
from ravectl.cli import options
from ravectl.errors import EXIT_CHECK, RavectlError, UsageError

if TYPE_CHECKING:
    from ravectl.model import Secret
    from ravectl.rotate import Done
    from ravectl.vault import Sealed
    from ravectl.workspace import Workspace

app = typer.Typer(no_args_is_help=True, help="List, set, edit, check and share secrets.")


def init(
    recipient: Annotated[
        list[str] | None,
        typer.Option("--recipient", "-r", help="Encrypt for this public key too; repeatable."),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option("--identity", help="Your age key file; else sops' own place."),
    ] = None,
    workspace: options.Folder = None,
) -> None:
    """Make a workspace: a profile, an age key if you have none, and encrypted secrets."""
    from ravectl import plan, vault

    space = options.find_workspace(workspace)
    if workspace is None and space.root != Path.cwd():
        console.note(
            f"the workspace is {space.root}, which has rave.yaml or .rave; "
            "for one in this folder: ravectl init --workspace ."
        )
    made = vault.init(space, plan.SECRETS, options.opener(space, identity), recipient or ())
    if space.make_profile():
        console.note(f"{space.profile_file} is the profile: what differs from safe goes there")
    if made.made_identity:
        console.note(f"new age identity in {made.identity.where}: keep a copy where you keep keys")
    console.note(f"{space.root / vault.FILE} is encrypted for {', '.join(made.recipients)}")
    console.note("commit it with .sops.yaml; what is private is in .rave, which git ignores")


@app.command("list")
def list_(
    as_json: options.AsJson = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show names, ages and readers, never values; needs no key."""
    from ravectl import plan, vault

    space = options.find_workspace(workspace)
    places = vault.Places(space)
    held = {SHARED: vault.look(places.shared)}
    own = places.machine(space.instance_dir(name))
    if own.exists():
        held[name] = vault.look(own)
    rows = _rows(plan.SECRETS, held)
    if as_json:
        options.print_json(rows)
        return
    for r in rows:
        age = "-" if r["days"] is None else f"{r['days']} days"
        readers = ", ".join(r["readers"]) or "-"
        grace = f"  (the one before: until {r['previous_until']})" if r["previous_until"] else ""
        print(f"{r['name']:<28} {r['kind']:<15} {r['where']:<10} {age:>9}  {readers}{grace}")


SHARED = "workspace"
_ABSENT = {"workspace": "not set", "instance": "not made", "derived": "derived"}


def _rows(secrets: tuple[Secret, ...], held: dict[str, Sealed]) -> list[dict[str, Any]]:
    from ravectl import plan

    rows = []
    for s in secrets:
        where = next((w for w, v in held.items() if s.name in v.names), "")
        until = held[where].until.get(s.name) if where else None
        rows.append(
            {
                "name": s.name,
                "kind": s.kind.value,
                "where": where or _ABSENT[s.scope.value],
                "changed": held[where].changed.get(s.name) if where else None,
                "days": _days(held[where].changed.get(s.name)) if where else None,
                "previous_until": until,
                "readers": [r.name for r in plan.SERVICES if s.name in r.secrets],
            }
        )
    return rows


def _days(stamp: str | None) -> int | None:
    from ravectl import vault

    try:
        return (vault.now() - vault.parse_stamp(stamp or "")).days
    except ValueError:
        return None


@app.command("get")
def get(
    name: Annotated[str, typer.Argument(help="A name, as ravectl secrets list shows it.")],
    workspace: options.Folder = None,
) -> None:
    """Print the value of a secret of the workspace to stdout."""
    from ravectl import vault

    space = options.find_workspace(workspace)
    shared = vault.read(vault.Places(space).shared, options.opener(space))
    if name not in shared.values:
        raise UsageError(
            f"there is no secret {name!r} in {vault.FILE}", "see the names: ravectl secrets list"
        )
    print(shared.values[name].rstrip("\n"))


@app.command("set")
def set_(
    name: Annotated[str, typer.Argument(help="A name, as ravectl secrets list shows it.")],
    value: Annotated[str | None, typer.Argument(hidden=True)] = None,
    unset: Annotated[
        bool, typer.Option("--unset", help="Take an optional one away instead.")
    ] = False,
    workspace: options.Folder = None,
) -> None:
    """Give a secret the value that stdin holds, here and in running machines."""
    from ravectl import rotate

    if value is not None:
        raise UsageError(
            "a value is never an argument: process lists and the shell's history keep it",
            f"count it as known; give another one on stdin: ravectl secrets set {name}",
        )
    new = None if unset else _from_stdin(name)
    space = options.find_workspace(workspace)
    _say(rotate.set_values(space, options.opener(space), {name: new}, "set"))


def _from_stdin(name: str) -> str:
    if sys.stdin.isatty():
        return str(typer.prompt(f"value of {name}", hide_input=True, err=True))
    try:
        return sys.stdin.buffer.read().decode().rstrip("\r\n")  # whatever the locale
    except UnicodeDecodeError:
        raise UsageError(
            f"the value for {name} is not text",
            "give it as text, as by base64; nothing was changed",
        ) from None


@app.command("edit")
def edit(workspace: options.Folder = None) -> None:
    """Edit the values that may be given in $EDITOR; the plain text is in memory only."""
    from ravectl import rotate, vault

    space = options.find_workspace(workspace)
    opener = options.opener(space)
    rotate.require_secrets(space)
    shared = vault.ensure(space, _declared(), opener)
    names = [s.name for s in rotate.settable()]
    known = {n: shared.values[n] for n in names if n in shared.values}
    edited = _edited(known, [n for n in names if n not in known])
    changes = {n: edited.get(n) for n in {*known, *edited} if edited.get(n) != known.get(n)}
    if not changes:
        console.note("nothing was changed")
        return
    _say(rotate.set_values(space, opener, changes, "edit"))


def _declared() -> tuple[Secret, ...]:
    from ravectl import plan

    return plan.SECRETS


def _edited(known: dict[str, str], unset: list[str]) -> dict[str, str]:
    """What a person made of these values in an editor."""
    import yaml

    from ravectl import command, files

    editor = _editor()
    head = "# save and leave to change; values are text\n"
    text = head + yaml.safe_dump(known) + "".join(f"# {n}: not set\n" for n in unset)
    with files.in_memory() as folder:
        path = folder / "secrets.yaml"
        files.write_atomic(path, text, files.PRIVATE_FILE)
        if code := command.interactive([*editor, str(path)], "name yours: export EDITOR=vi"):
            raise RavectlError(f"{editor[0]} ended with exit {code}", "nothing was changed")
        try:
            found = yaml.safe_load(path.read_text())
        except OSError as e:
            raise RavectlError(
                f"{editor[0]} left no file that can be read: {files.why_not(e)}",
                "edit again; nothing was changed",
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise RavectlError(
                "what was saved is no YAML", "edit again; nothing was changed"
            ) from None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise RavectlError(
            "what was saved is no mapping of names to texts",
            "put values in quotes; nothing was changed",
        )
    return {str(k): v for k, v in found.items()}


def _editor() -> list[str]:
    """The editor that the person named, as a command; UsageError when it is none."""
    variable = next((v for v in ("VISUAL", "EDITOR") if os.environ.get(v)), None)
    try:
        words = shlex.split(os.environ[variable] if variable else "editor")
    except ValueError:
        words = []
    if not words:
        raise UsageError(f"${variable} is not a command line", f"as in: export {variable}=vi")
    return words


@app.command("check")
def check(as_json: options.AsJson = False, workspace: options.Folder = None) -> None:
    """Look for missing, malformed, stale and leaked secrets (exit 3 when there are some)."""
    from ravectl import audit

    space = options.find_workspace(workspace)
    found = audit.check(space, _declared(), options.opener(space))
    if as_json:
        options.print_json(found)
    else:
        for f in found:
            print(f"{f.text}\n  fix: {f.remedy}")
    if found:
        raise typer.Exit(EXIT_CHECK)
    console.note("the secrets are in order")


@app.command("diff")
def diff(
    as_json: options.AsJson = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show what a machine would get (path, owner, mode) and what of it differs from what it has."""
    from ravectl import rotate

    space = options.find_workspace(workspace)
    rows = rotate.compare(space, options.opener(space), options.find_instance(workspace, name))
    if as_json:
        options.print_json(rows)
        return
    for r in rows:
        owner = f"{r.owner}:{r.group}"
        print(f"{r.change:<8} {r.mode} {owner:<18} {r.size:>5} B  {r.path}")


@app.command("deliver")
def deliver(workspace: options.Folder = None) -> None:
    """Bring running machines what the files hold; also ends a change that was cut short."""
    from ravectl import rotate

    space = options.find_workspace(workspace)
    _say(rotate.deliver(space, options.opener(space)))


@app.command("recipients")
def recipients(
    add: Annotated[
        list[str] | None, typer.Option("--add", help="Encrypt for this public key too.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", help="Encrypt no longer for this one.")
    ] = None,
    workspace: options.Folder = None,
) -> None:
    """Show whom the secrets are encrypted for, or change it (under a new data key)."""
    from ravectl import rotate, vault

    space = options.find_workspace(workspace)
    if add or remove:
        _say(rotate.share(space, options.opener(space), add or (), remove or ()))
    if remove:
        _say_known(space)
    for recipient in vault.Places(space).recipients():
        print(recipient)


def _say_known(space: Workspace) -> None:
    """What a person who was removed still knows, and how each becomes worthless."""
    from ravectl import rotate, vault

    made, given = rotate.left_out(vault.look(vault.Places(space).shared).names)
    console.warn("who was removed knows the values so far: ravectl rotate-secrets --no-grace")
    if made:
        names = " ".join(made)
        console.warn(f"which leaves out {names}: ravectl rotate-secrets {names} --no-grace")
    for name in given:
        console.warn(f"and {name}: revoke it at its issuer, then: ravectl secrets set {name}")


def rotate_secrets(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names; else all that are rotated routinely.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All that are rotated routinely (the default).")
    ] = False,
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="Only those older than this, as 90d or 12h.")
    ] = None,
    ssh: Annotated[bool, typer.Option("--ssh", help="The SSH host and operator keys.")] = False,
    age: Annotated[
        bool, typer.Option("--age", help="Your age identity and the files' data keys.")
    ] = False,
    grace: Annotated[
        bool,
        typer.Option("--grace/--no-grace", help="Accept a webhook's secret of before for 24 h."),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Show past changes instead.")] = False,
    as_json: options.AsJson = False,
    workspace: options.Folder = None,
) -> None:
    """Give secrets new values, in the files and in running machines, or change nothing."""
    from ravectl import rotate

    space = options.find_workspace(workspace)
    if history:
        _show_history(space, as_json)
        return
    opener = options.opener(space)
    limit = None if older_than is None else _duration(older_than)
    wanted = list(names or ())
    if everything and wanted:
        raise UsageError("--all and names contradict each other", "give one of them")
    rotate.check_names(wanted)  # before --age makes a key
    asked = rotate.Asked(tuple(wanted), limit, ssh, everything, grace)
    # --age alone is the identity alone
    values_too = bool(wanted or everything or ssh or limit is not None or not age)
    if dry_run:
        rotate.require_secrets(space)
        chosen = rotate.preview(space, opener, asked) if values_too else ()
        for name in (*chosen, *(["age identity"] if age else [])):
            print(name)
        return
    if age:
        with console.step("the age identity"):
            done, recipient = rotate.rotate_identity(space, opener)
        console.note(
            f"files are encrypted for {recipient} now; the identity before is still in "
            f"{opener.where}, take it out when nothing else needs it"
        )
    if values_too:
        with console.step("rotating secrets"):
            done = rotate.rotate(space, opener, asked)
        _say(done)
    if as_json:
        options.print_json(
            {"names": done.names, "machines": done.machines, "seconds": done.seconds,
             "steps": dict(done.durations)}
        )  # fmt: skip


def _say(done: Done) -> None:
    if not done.files and not done.machines:
        console.note("nothing to change")
        return
    if not done.names and done.files:
        console.note(f"encrypted anew: {', '.join(done.files)}")
    for name in done.names:
        console.note(f"  {name}")
    where = ", ".join(done.machines) or "no running machine"
    console.note(f"{len(done.names)} changed, {done.seconds:.1f} s, brought to: {where}")


def _duration(text: str) -> datetime.timedelta:
    found = re.fullmatch(r"(\d{1,5})([dhm])", text)
    if not found:
        raise UsageError(f"{text!r} is no duration", "as in 90d, 12h or 30m")
    unit = {"d": "days", "h": "hours", "m": "minutes"}[found[2]]
    return datetime.timedelta(**{unit: int(found[1])})


def _show_history(space: Workspace, as_json: bool) -> None:
    from ravectl import journal

    rows = journal.history(space.state)
    if as_json:
        options.print_json(rows)
        return
    for r in rows:
        names = ", ".join(r.get("names", [])) or "-"
        cause = f" ({r['cause']})" if r.get("cause") else ""
        print(
            f"{r.get('time')}  {r.get('who')}  {r.get('action')}: {r.get('outcome')}{cause}, "
            f"{r.get('seconds')} s  {names}"
        )
