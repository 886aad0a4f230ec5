"""Build: from a Plan to an image in the store; what builds promise beyond that; what to keep."""

from __future__ import annotations

import itertools
import os
import shlex
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from ravectl import command, console, files, imagelock, images, signing
from ravectl.engines import debian, nix
from ravectl.errors import HostError, RavectlError, UsageError
from ravectl.imagelock import LOCK_FILE
from ravectl.instance import Instance
from ravectl.model import EngineName, Image, ImageFormat, NixSettings, Plan
from ravectl.plan import ACCOUNTS
from ravectl.render import write_tree
from ravectl.workspace import Workspace

CHECK_BYTES = 8 * 2**30  # two bases, two images
SPARED_SECONDS = 60.0  # an image that was asked for this recently may be about to get an overlay
MAX_SHOWN = 12


@dataclass(frozen=True)
class Request:
    """What is to be built."""

    plan: Plan
    format: ImageFormat = ImageFormat.QCOW2
    compress: bool = False
    engine: EngineName = EngineName.DEBIAN
    nix: NixSettings = field(default_factory=NixSettings)
    offline: bool = False


def engine_name(name: str) -> EngineName | None:
    """The engine called `name`, None for "auto"; UsageError names those there are."""
    known = ["auto", *(e.value for e in EngineName)]
    if name not in known:
        raise UsageError(f"there is no engine {name!r}", f"use one of: {', '.join(known)}")
    return None if name == "auto" else EngineName(name)


def choose_engine(
    asked: EngineName | None, fmt: ImageFormat, settings: NixSettings, *, offline: bool = False
) -> EngineName:
    """The engine that makes an image: the one asked for, else nix where it can, else debian.

    Says which and why, when nobody asked. Raises HostError when only nix makes the format and
    cannot here.
    """
    if asked is not None:
        return asked
    why = nix.unusable(settings, offline=offline)
    if why is None:
        console.note(f"engine nix: {'nix is there' if offline else 'its substituters answer'}")
        return EngineName.NIX
    if not fmt.boots_directly:
        raise HostError(f"only the nix engine makes {fmt}, and {why[0]}", why[1])
    console.note(f"engine debian: {why[0]}")
    return EngineName.DEBIAN


def image_format(name: str) -> ImageFormat:
    """The format called `name`; UsageError names those there are."""
    known = [f.value for f in ImageFormat]
    if name not in known:
        raise UsageError(f"there is no image format {name!r}", f"use one of: {', '.join(known)}")
    return ImageFormat(name)


def build(
    request: Request, workspace: Workspace, *, locked: bool = False, update: bool = False
) -> Image:
    """The image of `request`, from the store or made now.

    rave.lock is written when what the image is made of has changed; with `locked` a change is
    refused instead. `update` takes the mirror's packages of today. Raises RavectlError naming
    what drifted, or what failed; HostError when this host lacks something.
    """
    if request.compress and request.format is not ImageFormat.QCOW2:
        raise UsageError("--compress is for the format qcow2", f"leave it out of {request.format}")
    for line in absent(request.plan, request.engine):
        console.note(line)
    if request.engine is EngineName.NIX:
        return _build_nixos(request, workspace, update=update)
    if not request.format.boots_directly:
        raise UsageError(
            f"the debian engine makes no {request.format}", "use --engine nix, which makes it"
        )
    if not os.environ.get(signing.KEY_VARIABLE):  # else nothing is written there
        workspace.prepare()  # one that cannot be used is told before a long build
    lock_file = workspace.root / LOCK_FILE
    inputs = _locked(request, lock_file) if locked else _resolve(request, fresh=update)
    image, made = images.ensure_image(inputs, workspace)
    console.note(f"image {image.digest} {'is made' if made else 'was there already'}")
    if not locked and imagelock.write(lock_file, images.lock_of(inputs.base)):
        console.note(f"{lock_file} names what it is made of")
    return image


def absent(plan: Plan, engine: EngineName) -> list[str]:
    """What the profile wants and a machine of that engine does not have, and the remedy. Pure."""
    remedy = {
        "grafana": "name its package source as monitoring.grafana.apt_source (docs/profiles.md)",
        "tempo": "spans stay in the dispatcher's store; tracing.otlp_endpoint sends them elsewhere",
    }
    there = plan.on(engine)
    return [
        f"the engine {engine} has no {s.description.partition(',')[0]}, so this machine has none: "
        f"{remedy[s.name]}"
        for s in plan.services
        if not there.has(s.name)
    ]


def _build_nixos(request: Request, workspace: Workspace, *, update: bool) -> Image:
    if update:
        lock_inputs(request.plan, workspace, update=True)
    inputs = resolve_nixos(request, workspace)
    image, made = images.ensure_image(inputs, workspace)
    console.note(f"image {image.digest} {'is made' if made else 'was there already'}")
    return image


def resolve_nixos(request: Request, workspace: Workspace) -> images.NixInputs:
    """What an image of the nix engine is made from here."""
    return images.resolve_nixos(
        request.plan,
        request.format,
        request.nix,
        compress=request.compress,
        offline=request.offline,
        flake_lock=flake_lock(workspace),
    )


def flake_lock(workspace: Workspace) -> str | None:
    """The workspace's own flake.lock, if it has one; RavectlError when it is damaged."""
    path = workspace.root / nix.LOCK_FILE
    if not path.exists():
        return None
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise RavectlError(f"cannot read {path}: {e}", f"see to it: ls -l '{path}'") from None
    nix.pins(text, path)
    return text


def lock_inputs(plan: Plan, workspace: Workspace, *, update: bool) -> tuple[nix.Pin, ...]:
    """Write the workspace's flake.lock: the one we ship, or (`update`) today's revisions.

    One that is there stays as it is unless it is to be updated. Raises HostError when this host
    has no fitting Nix to ask.
    """
    path = workspace.root / nix.LOCK_FILE
    known = flake_lock(workspace)
    tree = images.render_nixos((plan,), known)
    text = tree.file(nix.LOCK_FILE).content
    if update:
        with (
            nix.written(lambda folder: write_tree(tree, folder)) as flake,
            console.step("today's revisions"),
        ):
            text = nix.updated_lock(flake)
    found = nix.pins(text, path)
    if text != known:
        files.write_atomic(path, text)
    return found


def _resolve(request: Request, *, fresh: bool = False) -> images.Inputs:
    return images.resolve_debian(
        request.plan, request.format, compress=request.compress, fresh=fresh
    )


def _locked(request: Request, lock_file: Path) -> images.Inputs:
    wanted = imagelock.read(lock_file)
    inputs = _resolve(request)
    if imagelock.drift(wanted, images.lock_of(inputs.base)):
        # the cache may be of another day than the lock; the mirror may have what it names
        console.note(f"the cached packages are not those of {LOCK_FILE}: asking the mirror")
        inputs = images.resolve_debian(
            request.plan,
            request.format,
            compress=request.compress,
            fresh=True,
            accept=lambda base: imagelock.require_same(wanted, images.lock_of(base)),
        )
    return inputs


def export(image: Image, output: Path) -> None:
    """Copy the image's disk to `output`, whole or not at all; UsageError when that cannot be."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder", f"name a file: {output}/rave.{image.format}")
    if not output.absolute().parent.is_dir():
        raise UsageError(
            f"there is no folder {output.absolute().parent}",
            f"make it: mkdir -p '{output.absolute().parent}'",
        )
    files.require_space(output.absolute().parent, image.disk.stat().st_blocks * 512, "the copy")
    part = output.with_name(f".{output.name}.part")
    try:
        command.run(["cp", "--sparse=always", "--reflink=auto", image.disk, part])
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


# --- the same twice? ---------------------------------------------------------------------------


def check(request: Request, workspace: Workspace) -> str:
    """Build twice from nothing, compare the bits, and return the digest of the disk.

    Neither cache nor store is used or changed. Raises RavectlError naming the files in which
    the two differ.
    """
    if request.engine is EngineName.NIX:
        return _check_nixos(request, workspace)
    debian.require_root()
    cache = files.make_dir(files.cache_dir())
    files.require_space(cache, CHECK_BYTES, "building twice")
    with files.staging(cache, "check") as stage:
        made = [_build_apart(request, stage / f"build{n}") for n in (1, 2)]
        (base1, image1), (base2, image2) = made
        if image1.hashes == image2.hashes:
            return image1.hashes[image1.disk.name]
        if moved := imagelock.drift(images.lock_of(base1), images.lock_of(base2)):
            raise RavectlError(
                "the mirror changed between the two builds",
                "run it again",
                details="\n".join(moved[:MAX_SHOWN]),
            )
        lines = tree_differences(base1.root, base2.root)
        lines += [n for n in image1.hashes if image1.hashes[n] != image2.hashes[n]]
        raise RavectlError(
            "two builds of the same inputs differ",
            "report it: a build must give the same bits",
            details="\n".join(lines[:MAX_SHOWN]),
        )


def _check_nixos(request: Request, workspace: Workspace) -> str:
    """The same by Nix' own means: it builds the image again and compares."""
    inputs = resolve_nixos(request, workspace)
    images.build_nixos(inputs)
    built = images.build_nixos(inputs, rebuild=True)
    return files.digest_file(built.disk(request.format))


def _build_apart(request: Request, folder: Path) -> tuple[debian.Base, Image]:
    folder.mkdir()
    plan = request.plan.on(EngineName.DEBIAN)
    with console.step(folder.name):
        base = debian.make_base(
            folder,
            plan.accounts,
            forwarding=plan.logs.forward is not None,
            grafana=plan.grafana_source,
        )
        tree = images.render_debian(plan)
        inputs = images.Inputs(plan, tree, base, request.format, request.compress)
        images.make_image(inputs, folder / "image")
    return base, images.load(folder / "image")


def tree_differences(one: Path, two: Path) -> list[str]:
    """The paths at which two trees differ in kind, mode, owner, size or content, sorted."""
    known = {p: _fingerprint(one / p) for p in _paths(one)}
    other = {p: _fingerprint(two / p) for p in _paths(two)}
    return sorted(str(p) for p in known.keys() | other.keys() if known.get(p) != other.get(p))


def _paths(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        found += [(Path(folder) / n).relative_to(root) for n in itertools.chain(folders, names)]
    return found


def _fingerprint(path: Path) -> tuple[object, ...]:
    s = path.lstat()
    if stat.S_ISLNK(s.st_mode):
        content: object = str(path.readlink())
    elif stat.S_ISREG(s.st_mode):
        content = files.digest_file(path)
    else:
        content = None
    return s.st_mode, s.st_uid, s.st_gid, content


# --- what to keep ------------------------------------------------------------------------------


def collect(*, dry_run: bool, everything: bool = False) -> list[tuple[Path, int]]:
    """Remove images that no instance of any workspace uses, and bases of other recipes.

    With `everything` the current base goes too. Returns what was removed (or would be, with
    `dry_run`) with its size in bytes. Raises RavectlError when nobody can say which image an
    instance needs.
    """
    if not files.cache_dir().is_dir():
        return []
    store = files.make_dir(images.store_dir())
    debians = files.make_dir(files.cache_dir() / "debian")
    with (
        files.lock(store / "lock", "the image store"),
        files.lock(debians / "lock", "the cache of Debian bases"),
    ):
        doomed = _unused_images(store) + _unused_bases(debians, everything)
        found = [(path, _size(path)) for path in doomed]
        if not dry_run:
            for path in doomed:
                files.remove_tree(path)
            nix.forget_roots(files.cache_dir(), {p.name for p in store.iterdir()})
    return found


def _unused_images(store: Path) -> list[Path]:
    roots = images.roots()
    used = {_image_of(Instance(r.folder, r.folder.name)) for r in roots if r.is_there}
    used |= _images_of_absent([r for r in roots if not r.is_there])
    now = time.time()
    return [
        p
        for p in sorted(store.iterdir())
        if p.is_dir()
        and p.name not in used
        and not p.name.startswith("making.")
        and now - p.stat().st_mtime > SPARED_SECONDS
    ]


def _images_of_absent(roots: list[images.Root]) -> set[str | None]:
    """The images of instances whose folder is not there, which may be moved or not mounted.

    Says which they are and how to have them forgotten. Raises RavectlError when one does not
    tell its image.
    """
    unknown = [r for r in roots if r.image is None]
    if unknown:
        first, more = unknown[0], f" ({len(unknown)} such)" if len(unknown) > 1 else ""
        raise RavectlError(
            f"an instance that was in {first.folder} is not there, and its image is not known"
            f"{more}",
            "bring the folder back and start it once; or if it is gone for good: "
            f"{shlex.join(['rm', *(str(r.link) for r in unknown)])}",
        )
    for r in roots[:MAX_SHOWN]:
        console.warn(
            f"an instance that was in {r.folder} is not there; its image {r.image} is kept; "
            f"if it is gone for good: rm {shlex.quote(str(r.link))}"
        )
    if len(roots) > MAX_SHOWN:
        parent = shlex.quote(str(roots[0].link.parent))
        console.warn(
            f"{len(roots) - MAX_SHOWN} more are not there: see them: find {parent} -xtype l -ls; "
            f"if all are gone for good: find {parent} -xtype l -delete"
        )
    return {r.image for r in roots}


def _image_of(instance: Instance) -> str | None:
    """The image that an instance needs, which its disk says where its record does not."""
    try:
        instance.require_no_lost_disk()
        record = instance.record
    except RavectlError as e:
        try:
            return images.below(instance.overlay)
        except RavectlError:
            raise e from None  # it may need any
    return record.image if record is not None else None


def _unused_bases(folder: Path, everything: bool) -> list[Path]:
    keep = (
        set()
        if everything
        else {f"base-{debian.base_key(ACCOUNTS, forwarding=f)}" for f in (False, True)}
    )
    return [p for p in sorted(folder.glob("base-*")) if p.name not in keep]


def _size(path: Path) -> int:
    return sum(p.lstat().st_blocks * 512 for p in path.rglob("*"))
