"""Verbs up to the image: profiles, plan, render, lock, build, gc, image ..."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ravectl import console
from ravectl.cli import options
from ravectl.errors import EXIT_CHECK, RavectlError, UsageError

if TYPE_CHECKING:
    from ravectl.model import EngineName, Plan
    from ravectl.workspace import Workspace

app = typer.Typer(no_args_is_help=True, help="Verify and sign the images of the store.")


def profiles(as_json: options.AsJson = False, workspace: options.Folder = None) -> None:
    """List the profiles there are, and what each promises."""
    from ravectl import profile
    from ravectl.model import to_json

    space = options.find_workspace(workspace)
    plans = {n: options.make_plan(n, space) for n in profile.shipped()}
    if space.profile_file:
        own = options.make_plan(None, space)
        plans[own.profile] = own
    if as_json:
        options.print_json({n: to_json(p.machine) for n, p in plans.items()})
        return
    for name, plan in plans.items():
        m = plan.machine
        egress = "open" if plan.network.egress else "closed"
        print(
            f"{name:<12} {m.memory_mb} MB, {m.cpus} CPUs, {m.disk_gb} GB disk, "
            f"{len(plan.services)} services, way out {egress}"
        )


def plan(
    safe: options.Safe = False,
    full_pipe: options.FullPipe = False,
    profile: options.ProfileName = None,
    as_json: options.AsJson = False,
    workspace: options.Folder = None,
) -> None:
    """Show everything that a profile implies."""
    made = options.plan_asked(safe, full_pipe, profile, options.find_workspace(workspace))
    if as_json:
        options.print_json(made)
        return
    m = made.machine
    print(f"profile   {made.profile}")
    print(f"machine   {m.memory_mb} MB, {m.cpus} CPUs, {m.disk_gb} GB disk")
    print(f"way out   {'open' if made.network.egress else 'closed'}")
    total = sum(s.limits.memory_mb for s in made.services)
    print(f"services  {total} of {made.service_memory_mb} MB promised")
    for s in made.services:
        ports = ",".join(str(p) for p in s.ports)
        limits = f"{s.limits.memory_mb} MB {s.limits.cpu_percent}% cpu"
        one = s.engines[0] if len(s.engines) == 1 else None
        unit = f"{s.unit[one]} (only by the engine {one})" if one else s.unit["debian"]
        print(f"  {s.name:<17} :{ports:<14} {limits:<18} {unit}")
    print("routes")
    for r in made.routes:
        print(f"  {r.host or ''}{r.path:<14} {r.access.value}")


def render(
    folder: Annotated[Path, typer.Argument(help="Where to write the tree; new or empty.")],
    safe: options.Safe = False,
    full_pipe: options.FullPipe = False,
    profile: options.ProfileName = None,
    engine: Annotated[
        str, typer.Option("--engine", help="debian: files of /etc. nix: a flake of every profile.")
    ] = "debian",
    workspace: options.Folder = None,
) -> None:
    """Write the rendered configuration to a folder, to look at or to commit."""
    from ravectl import building, files, images
    from ravectl.model import EngineName
    from ravectl.render import write_tree

    space = options.find_workspace(workspace)
    made = options.plan_asked(safe, full_pipe, profile, space)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder", "name a new one")
    if building.engine_name(engine) is EngineName.NIX:
        tree = images.render_nixos(_every_plan(made, space), building.flake_lock(space))
    else:
        tree = images.render_debian(made)
    write_tree(tree, files.make_dir(folder))
    console.note(f"{len(tree.files)} files written to {folder}")


def _every_plan(asked: Plan, space: Workspace) -> tuple[Plan, ...]:
    """The Plan asked for, and those of the shipped profiles beside it."""
    from ravectl import profile

    others = (options.make_plan(n, space) for n in profile.shipped())
    return (asked, *(p for p in others if p.profile != asked.profile))


def lock(
    update: Annotated[bool, typer.Option("--update", help="Take the revisions of today.")] = False,
    workspace: options.Folder = None,
) -> None:
    """Write flake.lock beside rave.yaml: the inputs that the nix engine builds from."""
    from ravectl import building

    space = options.find_workspace(workspace)
    for pin in building.lock_inputs(options.make_plan(None, space), space, update=update):
        print(f"{pin.name:<10} {pin.revision}  {pin.nar_hash}")


Format = Annotated[
    str, typer.Option("--format", help="qcow2, raw; by the nix engine those of NixOS, too.")
]
Offline = Annotated[bool, typer.Option("--offline", help="nix: what is in the Nix store must do.")]
Compress = Annotated[
    bool, typer.Option("--compress", help="Compress the qcow2 (zstd): smaller, slower.")
]
Locked = Annotated[
    bool, typer.Option("--locked", help="Refuse anything that differs from rave.lock.")
]
Update = Annotated[
    bool, typer.Option("--update", help="Take the packages (nix: the revisions) of today.")
]
Check = Annotated[bool, typer.Option("--check", help="Build twice and compare the bits.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Also write the disk to this file.")
]


def build(
    safe: options.Safe = False,
    full_pipe: options.FullPipe = False,
    profile: options.ProfileName = None,
    form: Format = "qcow2",
    engine: options.Engine = "auto",
    offline: Offline = False,
    compress: Compress = False,
    locked: Locked = False,
    update: Update = False,
    check: Check = False,
    output: Output = None,
    as_json: options.AsJson = False,
    workspace: options.Folder = None,
) -> None:
    """Make the image of a profile; nothing is made twice."""
    from ravectl import building
    from ravectl.plan import make_plan

    space = options.find_workspace(workspace)
    if locked and update:
        raise UsageError("--locked and --update contradict each other", "give one of them")
    chosen = options.select_profile(options.profile_flag(safe, full_pipe, profile), space)
    fmt, asked = building.image_format(form), building.engine_name(engine)
    request = building.Request(
        make_plan(**chosen.plan_arguments()),
        fmt,
        compress=compress,
        engine=building.choose_engine(asked, fmt, chosen.nix_settings(), offline=offline),
        nix=chosen.nix_settings(),
        offline=offline,
    )
    _require_consistent(request.engine, locked, update, offline, check, output)
    if check:
        digest = building.check(request, space)
        console.note(f"built twice: the same bits (disk sha256 {digest})")
        return
    image = building.build(request, space, locked=locked, update=update)
    if output is not None:
        building.export(image, output)
    if as_json:
        options.print_json(
            {
                "digest": image.digest,
                "disk": image.disk,
                "sizes": image.sizes,
                "hashes": image.hashes,
            }
        )
    else:
        print(image.disk if output is None else output)


def _require_consistent(
    engine: EngineName, locked: bool, update: bool, offline: bool, check: bool, output: Path | None
) -> None:
    if locked and engine.value == "nix":
        raise UsageError(
            "--locked is for the debian engine", "leave it out: flake.lock always holds for nix"
        )
    if update and offline:
        raise UsageError("--update and --offline contradict each other", "give one of them")
    if check and output is not None:
        raise UsageError("--check keeps no image to write out", "leave -o out, or --check")


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the cached packages of the current recipe.")
    ] = False,
) -> None:
    """Remove images that no instance of any workspace uses, and outdated bases."""
    from ravectl import building

    freed = building.collect(dry_run=dry_run, everything=everything)
    for path, size in freed:
        print(f"{path}  {size // 2**20} MB")
    word = "would be freed" if dry_run else "freed"
    console.note(f"{sum(size for _, size in freed) // 2**20} MB {word}")


@app.command("verify")
def verify(
    digest: Annotated[
        list[str] | None, typer.Argument(help="Which images; else those of this workspace.")
    ] = None,
    as_json: options.AsJson = False,
    workspace: options.Folder = None,
) -> None:
    """Hold images against their signed manifests; exit 3 when one does not hold."""
    from ravectl import images

    for given in digest or ():
        images.require_digest(given)
    space = options.find_workspace(workspace)
    asked = digest or _used(space)
    if not asked:
        raise UsageError(
            "no machine of this workspace has an image", "name one: ravectl image verify DIGEST"
        )
    rows = [_verdict(space, d) for d in dict.fromkeys(asked)]
    if as_json:
        options.print_json(rows)
    else:
        for r in rows:
            print(f"{r['digest']}  " + (f"signed by {r['signer']}" if r["ok"] else f"{r['cause']}"))
            if not r["ok"]:
                console.note(f"fix: {r['remedy']}")
    if not all(r["ok"] for r in rows):
        raise typer.Exit(EXIT_CHECK)


def _used(space: Workspace) -> list[str]:
    from ravectl.instance import list_instances

    records = [i.record for i in list_instances(space.instances_dir)]
    return [r.image for r in records if r is not None and r.image is not None]


def _verdict(space: Workspace, digest: str) -> dict[str, object]:
    from ravectl import images, signing

    row: dict[str, object] = {"digest": digest, "ok": False, "signer": None}
    try:
        signer = signing.verify(space, images.find(digest))
    except RavectlError as e:
        return {**row, "cause": e.message, "remedy": e.hint}
    return {**row, "ok": True, "signer": signer, "cause": None, "remedy": None}


@app.command("sign")
def sign(
    digest: Annotated[str, typer.Argument(help="The image, as ravectl status --json shows it.")],
    workspace: options.Folder = None,
) -> None:
    """Vouch for an image of the store by this workspace's key: you know where it is from."""
    from ravectl import images, signing

    images.require_digest(digest)
    space = options.find_workspace(workspace)
    found = images.find(digest)
    signing.sign(space, found.folder)
    console.note(f"image {digest}: signed by {signing.verify(space, found)}")


@app.command("key")
def key(
    principal: Annotated[str, typer.Argument(help="What to call it, as in ci@example.org.")],
    workspace: options.Folder = None,
) -> None:
    """Print the line of allowed_signers by which others take this workspace's images."""
    from ravectl import signing

    print(signing.signer_line(options.find_workspace(workspace), principal))
