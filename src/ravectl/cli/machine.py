"""Verbs of a machine's life: up, down, status, reset."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ravectl import console, errors
from ravectl.cli import options
from ravectl.errors import EXIT_FAILED, RavectlError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ravectl.instance import Instance
    from ravectl.model import Accelerator, Image
    from ravectl.workspace import Workspace

DAMAGED = "damaged"  # the state of an instance whose record or files cannot be read


def up(
    safe: options.Safe = False,
    full_pipe: options.FullPipe = False,
    profile: options.ProfileName = None,
    engine: options.Engine = "auto",
    accel: Annotated[
        str, typer.Option("--accel", help="kvm, tcg, or auto: KVM where it works.")
    ] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds until it is given up.")] = 300.0,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Leave a machine that fails running.")
    ] = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Start the machine (building its image first if need be) and wait until all of it is up."""
    from ravectl import building, lifecycle, rotate
    from ravectl.model import ImageFormat
    from ravectl.plan import make_plan

    options.require_seconds(timeout, "--timeout")
    space = options.find_workspace(workspace)
    chosen = options.select_profile(options.profile_flag(safe, full_pipe, profile), space)
    plan, asked = make_plan(**chosen.plan_arguments()), building.engine_name(engine)

    def image() -> Image:
        made_by = building.choose_engine(asked, ImageFormat.QCOW2, chosen.nix_settings())
        request = building.Request(plan, engine=made_by, nix=chosen.nix_settings())
        return building.build(request, space)

    rotate.recover(space, options.opener(space))
    started = lifecycle.up(
        space,
        name,
        plan,
        image,
        accelerator=_accelerator(accel),
        timeout=timeout,
        keep_failed=keep_failed,
    )
    if started.already:
        console.note(f"{name} is running already")
    else:
        console.note(
            f"first SSH command after {started.first_ssh_seconds:.0f} s, "
            f"every service up after {started.healthy_seconds:.0f} s"
        )
    print(_howto(started.instance))


def _accelerator(name: str) -> Accelerator | None:
    from ravectl.model import Accelerator

    known = ["auto", *(a.value for a in Accelerator)]
    if name not in known:
        raise UsageError(f"there is no accelerator {name!r}", f"use one of: {', '.join(known)}")
    return None if name == "auto" else Accelerator(name)


def _howto(found: Instance) -> str:
    """How the machine is used, as lines for a person."""
    endpoint = found.endpoint()
    flag = "" if found.name == options.DEFAULT_NAME else f" --name {found.name}"
    base = f"https://localhost:{endpoint.https_port}"
    return "\n".join(
        [
            f"console page   {base}/",
            f"Vibe Kanban    https://kanban.localhost:{endpoint.https_port}/",
            f"router         {base}/ccr/",
            f"sign in as     {endpoint.operator}, password: ravectl secrets get ingress/password",
            f"certificate    signed by {found.places.ca_cert}",
            f"shell          ravectl ssh{flag}      (port {endpoint.ssh_port})",
            f"verify         ravectl verify{flag}",
            f"stop           ravectl down{flag}",
        ]
    )


def down(
    timeout: Annotated[float, typer.Option(help="Seconds the guest gets to shut down.")] = 60.0,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Stop the machine; its disk stays."""
    from ravectl import lifecycle

    options.require_seconds(timeout, "--timeout")
    found = options.find_instance(workspace, name)
    console.note(f"{name}: {lifecycle.down(found, timeout)}")


def reset(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Throw the machine's disk away; the next up starts from a fresh image."""
    from ravectl import lifecycle

    found = options.find_instance(workspace, name)
    if not yes:
        typer.confirm(
            f"Everything on the disk of {name} will be lost. Go on?", abort=True, err=True
        )
    lifecycle.reset(found)
    console.note(f"{name} is reset; its credentials and ports stay")


def status(
    as_json: options.AsJson = False,
    name: Annotated[
        str | None, typer.Option("--name", "-n", envvar="RAVECTL_NAME", help="Only this instance.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on: services, memory, alerts, tasks.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", help="Seconds between refreshes of --watch.")
    ] = 5.0,
    workspace: options.Folder = None,
) -> None:
    """Show the instances of this workspace and what is true of them now.

    With --watch one machine, from the inside, until Ctrl-C: a live view on a terminal, lines
    elsewhere, with --json an object per refresh.
    """
    from ravectl.instance import list_instances

    space = options.find_workspace(workspace)
    if watch:
        _watch(_the_one(space, workspace, name), interval, as_json=as_json)
        return
    found = list_instances(space.instances_dir)
    if name is not None:
        # also one that is damaged has its row; one that is not there is told
        named = [i for i in found if i.name == name]
        found = named or [options.find_instance(workspace, name)]
    rows, faults = _rows(found)
    if as_json:
        options.print_json(rows)
    elif not rows:
        console.note(f"no instance in {space.root}: ravectl up makes one")
    else:
        print("\n".join(map(_line, rows)))
    for fault in faults:
        console.error(fault)
    if faults:
        raise typer.Exit(EXIT_FAILED)


def _the_one(space: Workspace, workspace: Path | None, name: str | None) -> Instance:
    """The instance that is meant: the one named, else the only one."""
    from ravectl.instance import list_instances

    names = [i.name for i in list_instances(space.instances_dir)]
    if name is None and len(names) > 1:
        raise UsageError(
            f"there are several instances: {', '.join(names)}",
            f"name the one to watch: ravectl status --watch --name {names[0]}",
        )
    return options.find_instance(workspace, name or next(iter(names), options.DEFAULT_NAME))


def _watch(found: Instance, interval: float, *, as_json: bool) -> None:
    from ravectl import reconnect
    from ravectl.cli import watching
    from ravectl.watch import LEAST_SECONDS, MOST_SECONDS

    if not LEAST_SECONDS <= interval <= MOST_SECONDS:
        raise UsageError(
            f"an interval of {interval:g} s is out of bounds",
            f"give one from {LEAST_SECONDS:g} to {MOST_SECONDS:g} s",
        )
    reconnect.check_running(found)
    with options.until_interrupted():
        watching.run(found, interval, as_json=as_json)


def _rows(instances: Iterable[Instance]) -> tuple[list[dict[str, Any]], list[RavectlError]]:
    """A row for each instance, and what is wrong with those that cannot be read."""
    rows, faults = [], []
    for i in instances:
        try:
            rows.append(_row(i))
        except (RavectlError, OSError) as e:
            fault = errors.of_file(e) if isinstance(e, OSError) else e
            if fault is None:
                raise
            row = {"name": i.name, "state": DAMAGED, "message": fault.message}
            rows.append({**row, "folder": str(i.folder)})
            faults.append(fault)
    return rows, faults


def _line(r: dict[str, Any]) -> str:
    """A row for a person."""
    if r["state"] == DAMAGED:
        return f"{r['name']:<16} {r['state']:<9} {r['folder']}"
    ports = f"ssh :{r['ssh_port']}  https :{r['https_port']}" if r["ssh_port"] else ""
    since = f"{r['uptime_seconds'] / 60:.0f} min" if r["uptime_seconds"] else ""
    panics = f"  kernel panics: {r['kernel_panics']}" if r["kernel_panics"] else ""
    held = f"  QEMU: {r['qemu']}" if r["qemu"] not in (None, "running") else ""
    told = f"{r['name']:<16} {r['state']:<9} {r['profile']:<10} {ports}  {since}{held}{panics}"
    return told.rstrip()


def _row(found: Instance) -> dict[str, Any]:
    from ravectl.model import InstanceState

    record, state = found.require_record(), found.state()
    running = state is InstanceState.RUNNING
    started = found.host_started()
    endpoint = found.endpoint() if record.ports else None
    return {
        "name": found.name,
        "state": state.value,
        "qemu": _qemu_status(found) if running else None,
        "profile": record.plan.profile,
        "engine": record.engine.value,
        "image": record.image,
        "accelerator": record.accelerator.value,
        "ssh_port": endpoint.ssh_port if endpoint else None,
        "https_port": endpoint.https_port if endpoint else None,
        "uptime_seconds": round(time.time() - started) if started else None,
        "kernel_panics": found.panics(),
        "folder": str(found.folder),
    }


def _qemu_status(found: Instance) -> str:
    try:
        with found.ask() as monitor:
            return str(monitor.ask("query-status")["status"])
    except (RavectlError, ConnectionError):
        return "does not answer"
