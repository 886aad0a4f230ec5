"""Images: built by an engine, kept in a store, addressed by the digest of what went in.

A published image is never changed. It is made in a folder beside the store and renamed into
it, so that an image is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ravectl import command, console, files, imagelock, inventory, model, signing, vault
from ravectl.engines import debian, disk, nix
from ravectl.errors import RavectlError, UsageError
from ravectl.model import (
    MANIFEST,
    EngineName,
    Image,
    ImageFormat,
    NixSettings,
    Plan,
    RenderedFile,
    RenderedTree,
)
from ravectl.render import render, write_tree
from ravectl.workspace import Workspace

NPM_BYTES = 2**28  # of a part from npm, while it is brought into Nix's store: measured 138 MB
PARTS = ("vmlinuz", "initrd", inventory.NAME)  # beside the disk, where the engine makes them
IMAGE_BYTES = 3 * 2**30  # of disk while an image is made: raw and converted, measured 2.3 GB


@dataclass(frozen=True)
class Inputs:
    """What a Debian image is made from; its digest is the image's address."""

    plan: Plan
    tree: RenderedTree
    base: debian.Base
    format: ImageFormat
    compress: bool

    @property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of everything that goes into the image."""
        value = [
            self.base.key,
            [[p.name, p.version, p.sha256] for p in self.base.packages],
            model.to_json(self.tree),
            model.to_json(self.plan),
            [self.format, self.compress],
        ]
        return files.digest_value(value)[:16]


@dataclass(frozen=True)
class NixInputs:
    """What a NixOS image is made from: Plan and flake, whose lock names the rest."""

    plan: Plan
    tree: RenderedTree
    format: ImageFormat
    compress: bool
    settings: NixSettings  # of the building, not of what is built
    offline: bool

    @property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 of everything that goes into the image."""
        # the other machines of the flake have no part in this one
        own = [
            f
            for f in self.tree.files
            if not f.path.startswith("modules/")
            or f.path.startswith(f"modules/{self.plan.hostname}/")
        ]
        value = [
            EngineName.NIX,
            model.to_json(own),
            model.to_json(self.plan),
            [self.format, self.compress],
        ]
        return files.digest_value(value)[:16]


def render_debian(plan: Plan) -> RenderedTree:
    """The configuration layer of a Plan for Debian, with the dispatcher's own code."""
    plan = plan.on(EngineName.DEBIAN)
    tree = render(
        files.find_data("templates") / "debian",
        plan,
        accounts=plan.accounts,
        required=vault.required(plan),
        bundle_magic=vault.MAGIC,
    )
    code = dispatcher_code(debian.DISPATCHER)
    return RenderedTree(tuple(sorted((*tree.files, *code), key=lambda f: f.path)))


def dispatcher_code(folder: str) -> list[RenderedFile]:
    """The service that runs in the machine, below `folder`: shipped beside ravectl."""
    source = files.package_source("rave_dispatcher")
    return [RenderedFile(f"{folder}/rave_dispatcher/{path}", text) for path, text in source.items()]


def render_nixos(plans: tuple[Plan, ...], flake_lock: str | None = None) -> RenderedTree:
    """The flake of these Plans: a machine for each, by its host name.

    `flake_lock` is the text of a flake.lock that takes the place of the one we ship.
    """
    folder = files.find_data("templates") / "nixos"
    plans = tuple(p.on(EngineName.NIX) for p in plans)
    top = render(folder, plans[0], manifest="flake.yaml", plans=plans, formats=nix.FORMATS)
    found = [
        replace(f, content=flake_lock) if flake_lock is not None and f.path == nix.LOCK_FILE else f
        for f in top.files
    ]
    for plan in plans:
        machine = render(
            folder,
            plan,
            manifest="machine.yaml",
            required=vault.required(plan),
            bundle_magic=vault.MAGIC,
            made=nix.TEST_VALUES,
            kanban=debian.KANBAN,
        )
        rows = (*machine.files, *dispatcher_code("dispatcher"))
        found += [replace(f, path=f"modules/{plan.hostname}/{f.path}") for f in rows]
    return RenderedTree(tuple(sorted(found, key=lambda f: f.path)))


def resolve_debian(
    plan: Plan,
    fmt: ImageFormat,
    *,
    compress: bool = False,
    fresh: bool = False,
    accept: Callable[[debian.Base], None] = lambda _: None,
) -> Inputs:
    """Render the Plan for Debian and find (or make) the base it goes on.

    `fresh` and `accept` are those of debian.ensure_base.
    """
    plan = plan.on(EngineName.DEBIAN)
    tree = render_debian(plan)
    base = debian.ensure_base(
        files.cache_dir(), plan.accounts, forwarding=plan.logs.forward is not None,
        grafana=plan.grafana_source, fresh=fresh, accept=accept,
    )  # fmt: skip
    return Inputs(plan, tree, base, fmt, compress)


def resolve_nixos(
    plan: Plan,
    fmt: ImageFormat,
    settings: NixSettings,
    *,
    compress: bool = False,
    offline: bool = False,
    flake_lock: str | None = None,
) -> NixInputs:
    """Render the flake of a Plan, with the lock of the workspace if it has one."""
    plan = plan.on(EngineName.NIX)
    return NixInputs(plan, render_nixos((plan,), flake_lock), fmt, compress, settings, offline)


def ensure_image(inputs: Inputs | NixInputs, workspace: Workspace) -> tuple[Image, bool]:
    """The image of these inputs and whether it had to be made, which the workspace then signs.

    One in the store that nobody we trust has signed is made again. Raises signing.AlteredError
    when somebody did and it is another now, HostError when there is no space, RavectlError
    when a step fails; then nothing is left but the cached base.
    """
    store = files.make_dir(store_dir())
    digest = inputs.digest
    folder = store / digest
    if found := _stored(folder, workspace):
        return found, False
    signing.key_file(workspace)  # a key that cannot be had is told before a long build
    if isinstance(inputs, Inputs):
        debian.require_root()
    else:
        build_nixos(inputs)  # it may take hours, for which nobody need wait at the store's lock
    with files.lock(store / "lock", "the image store", wait=True):
        if found := _stored(folder, workspace, said=True):
            return found, False
        if isinstance(inputs, NixInputs) and not nix.root_of(files.cache_dir(), digest).exists():
            build_nixos(inputs)  # gc let go of it meanwhile
        with files.staging(store, "making") as stage:
            files.require_space(store, IMAGE_BYTES, "an image")
            make_image(inputs, stage / "image")
            signing.sign(workspace, stage / "image")
            _publish(stage / "image", folder)
    return load(folder), True


def _publish(made: Path, folder: Path) -> None:
    """Put an image that was made into the store, in the place of one that nobody vouched for."""
    if (folder / MANIFEST).exists() and _same_manifest(made, folder):
        # what others signed of it holds of this one, too
        signatures = folder / signing.SIGNATURES
        for path in signatures.glob("*.sig") if signatures.is_dir() else ():
            if not (made / signing.SIGNATURES / path.name).exists():
                shutil.copy(path, made / signing.SIGNATURES)
    # moved away, and removed with what was staged: who reads it meanwhile finds one or the other
    if folder.exists():
        folder.rename(made.with_name("former"))
    made.rename(folder)


def _same_manifest(one: Path, two: Path) -> bool:
    return (one / MANIFEST).read_bytes() == (two / MANIFEST).read_bytes()


def store_dir() -> Path:
    """Where images are kept, a folder for each."""
    return files.cache_dir() / "images"


def _stored(folder: Path, workspace: Workspace, *, said: bool = False) -> Image | None:
    if not folder.exists():
        return None
    try:
        found = load(folder)
        signing.verify(workspace, found)
    except signing.AlteredError:
        raise
    except RavectlError as e:
        if not said:
            console.note(f"{e.message}: making it again")
        return None
    os.utime(folder)  # gc spares what was just asked for
    return found


def make_image(inputs: Inputs | NixInputs, target: Path) -> None:
    """Make the image of these inputs in the new folder `target`."""
    target.mkdir()
    if isinstance(inputs, Inputs):
        _make_debian(inputs, target)
    else:
        _make_nixos(inputs, target)


def _make_debian(inputs: Inputs, target: Path) -> None:
    image = disk_of(target, inputs.format)
    with files.staging(files.private_tmp(2 * 2**30), "ravectl-root") as work:
        root = work / "root"
        with console.step("configuration"):
            debian.copy_root(inputs.base.root, root)
            write_tree(inputs.tree, root)
            debian.compile_policy(root)
            debian.drop_setuid(root, inputs.plan.hardening.setuid[EngineName.DEBIAN])
            debian.close_cron(root)
            debian.compile_python(root, f"{debian.DISPATCHER}/rave_dispatcher")
            held = inventory.dump(inventory.take(root))
            (target / inventory.NAME).write_bytes(held)
        with console.step("file system"):
            raw = image if inputs.format is ImageFormat.RAW else work / "disk.raw"
            debian.make_filesystem(root, raw, inputs.plan.machine.disk_gb, inputs.plan.hostname)
        if raw != image:
            with console.step(f"{inputs.format} disk"):
                disk.convert(raw, image, inputs.format, compress=inputs.compress)
    shutil.copy(inputs.base.kernel, target / "vmlinuz")
    shutil.copy(inputs.base.initrd, target / "initrd")
    lock = lock_of(inputs.base)
    made_of: dict[str, object] = {
        "packages": lock.packages,
        "npm": lock.npm,
        "rave_lock": files.digest_bytes(imagelock.dump(lock).encode()),
        "wheels_lock": files.digest_file(files.find_data(debian.WHEELS_LOCK)),
    }
    _write_manifest(inputs, target, EngineName.DEBIAN, debian.CMDLINE, made_of)


def lock_of(base: debian.Base) -> imagelock.Lock:
    """What rave.lock says of an image on this base."""
    return imagelock.Lock(
        engine=EngineName.DEBIAN.value,
        suite=debian.SUITE,
        packages=tuple((p.name, p.version, p.sha256) for p in base.packages),
        npm=tuple(sorted((p.name, p.version, p.integrity) for p in debian.NPM_PARTS)),
    )


def build_nixos(inputs: NixInputs, *, rebuild: bool = False) -> nix.Built:
    """What Nix makes of these inputs, kept from its garbage collector.

    With `rebuild` its disk is built once more and compared: the file system, or what NixOS makes of
    it in another format, not what only names or converts that. Raises as nix.build does, and as
    debian.fetch_part: nixpkgs does not have all of it.
    """
    nix.require()
    part = debian.KANBAN
    # offline, what was built from it may be there, and then it is not missed
    if not inputs.offline and not nix.holds(part.tarball, part.integrity):
        with (
            console.step(f"npm part {part.name}"),
            files.staging(files.private_tmp(NPM_BYTES), "ravectl-npm") as stage,
        ):
            nix.hold(debian.fetch_part(part, stage))
    link = nix.root_of(files.cache_dir(), inputs.digest)
    attribute = nix.attribute(inputs.plan.hostname, inputs.format)
    with nix.written(lambda folder: write_tree(inputs.tree, folder)) as flake:
        wanted = nix.Build(
            flake,
            f"{attribute}.made" if rebuild else attribute,
            inputs.settings,
            offline=inputs.offline,
            rebuild=rebuild,
            held=(part.tarball,),
        )
        again = " --rebuild" if rebuild else ""
        with console.step(f"nix build{again} {wanted.attribute}") as step:
            nix.build(wanted, None if rebuild else link, step.update)
    return nix.Built(link)


def _make_nixos(inputs: NixInputs, target: Path) -> None:
    built = nix.Built(nix.root_of(files.cache_dir(), inputs.digest))
    with console.step(f"{inputs.format} disk"):
        source, image = built.disk(inputs.format), disk_of(target, inputs.format)
        if inputs.format is ImageFormat.RAW or inputs.compress:
            disk.convert(source, image, inputs.format, compress=inputs.compress)
        else:
            nix.copy(source, image)
    cmdline = ""
    if inputs.format.boots_directly:
        nix.copy(built.kernel, target / "vmlinuz")
        nix.copy(built.initrd, target / "initrd")
        cmdline = built.cmdline
    lock = inputs.tree.file(nix.LOCK_FILE).content
    made_of: dict[str, object] = {
        "closure": list(built.closure),
        "flake_lock": files.digest_bytes(lock.encode()),
    }
    _write_manifest(inputs, target, EngineName.NIX, cmdline, made_of)


def disk_of(folder: Path, fmt: ImageFormat) -> Path:
    """Where an image in `folder` has its disk."""
    return folder / f"disk.{fmt}"


def _write_manifest(
    inputs: Inputs | NixInputs,
    target: Path,
    engine: EngineName,
    cmdline: str,
    made_of: dict[str, object],
) -> None:
    parts = [
        p
        for p in (disk_of(target, inputs.format), *(target / name for name in PARTS))
        if p.exists()
    ]
    manifest = {
        "digest": inputs.digest,
        "engine": engine,
        "format": inputs.format,
        "cmdline": cmdline,
        "plan": model.to_json(inputs.plan),
        "plan_digest": files.digest_value(model.to_json(inputs.plan)),
        "sizes": {p.name: p.stat().st_size for p in parts},
        "hashes": {p.name: files.digest_file(p) for p in parts},
        **made_of,
    }
    files.write_json(target / MANIFEST, manifest)


def load(folder: Path) -> Image:
    """An image of the store; RavectlError when it is missing, truncated or of another version."""
    remedy = f"remove it and build again: rm -r {folder}"
    if not (folder / MANIFEST).exists():
        raise RavectlError(f"there is no image {folder.name}", "build it: ravectl build")
    try:
        data = (folder / MANIFEST).read_bytes()
        m = json.loads(data)
    except (ValueError, OSError) as e:
        raise RavectlError(f"{folder / MANIFEST} cannot be read: {e}", remedy) from None
    try:
        fmt = ImageFormat(m["format"])
        image = Image(
            digest=m["digest"],
            engine=EngineName(m["engine"]),
            format=fmt,
            folder=folder,
            disk=disk_of(folder, fmt),
            kernel=folder / "vmlinuz",
            initrd=folder / "initrd",
            cmdline=m["cmdline"],
            plan=model.from_json(Plan, m["plan"]),
            sizes=m["sizes"],
            hashes=m["hashes"],
            manifest=files.digest_bytes(data),
        )
    except (KeyError, ValueError, TypeError) as e:
        raise RavectlError(f"image {folder.name} has a damaged manifest ({e})", remedy) from None
    for name, size in image.sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise RavectlError(f"image {folder.name} is damaged: {name} is truncated", remedy)
    return image


def require_digest(text: str) -> None:
    """Raise UsageError for what cannot be the digest of an image."""
    if not re.fullmatch(r"[0-9a-f]{16}", text):
        raise UsageError(
            f"{text!r} is no digest of an image: 16 hex digits", "ravectl status --json shows it"
        )


def find(digest: str) -> Image:
    """The image addressed by `digest`; RavectlError when the store has none."""
    return load(store_dir() / digest)


def below(overlay: Path) -> str | None:
    """The digest of the image that a disk lies on; None and raises as folder_below."""
    folder = folder_below(overlay)
    return None if folder is None else folder.name


def folder_below(overlay: Path) -> Path | None:
    """The folder of the image that a disk lies on, None when there is no disk.

    It may be gone, or in a cache of before. Raises RavectlError when the disk does not say.
    """
    if not files.is_there(overlay):
        return None
    # -U: QEMU may run on it
    argv: command.Argv = ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", overlay]
    told = json.loads(command.run(argv).stdout)
    image = Path(told.get("full-backing-filename") or "").parent
    if image.parent.name != store_dir().name:
        raise RavectlError(
            f"{overlay} does not lie on an image of the store",
            f"see on what: qemu-img info -U {shlex.quote(str(overlay))}",
        )
    return image


# --- who uses them -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Root:
    """An instance that uses the store: a link to its folder, named UUID.IMAGE.PLACE."""

    link: Path
    folder: Path

    @property
    def image(self) -> str | None:
        """The image that it had at its last start; None when its link does not say."""
        return self.link.name.split(".")[1] if "." in self.link.name else None

    @property
    def is_there(self) -> bool:
        """Whether it is at its place: not moved, be it for another that is there since, and not on
        a disk that is not mounted."""
        if not self.folder.is_dir():
            return False
        try:
            record = json.loads((self.folder / "instance.json").read_text())
        except FileNotFoundError:
            return disk_of(self.folder, ImageFormat.QCOW2).exists()
        except (OSError, ValueError, RecursionError):
            return True  # who reads it is told
        uuid = record.get("uuid") if isinstance(record, dict) else None
        return uuid in (None, self.link.name.partition(".")[0])


def add_root(uuid: str, folder: Path, image: str) -> None:
    """Remember that the instance in `folder` uses `image`, so that gc keeps it."""
    parent = files.make_dir(files.cache_dir() / "roots")
    # the place is part of the name, for a copy of a workspace has the same UUID
    link = parent / f"{uuid}.{image}.{files.digest_bytes(os.fsencode(folder))[:8]}"
    if not link.is_symlink():  # first the new one: gc may look at any moment
        link.symlink_to(folder)
    for old in roots():
        mine = old.link != link and old.link.name.partition(".")[0] == uuid
        moved = old.image in (None, image) and not old.is_there
        if mine and (old.folder == folder or moved):
            old.link.unlink(missing_ok=True)


def roots() -> list[Root]:
    """Every instance that uses the store, also those whose folder is not there now."""
    parent = files.cache_dir() / "roots"
    links = sorted(parent.iterdir()) if parent.is_dir() else []
    return [Root(link, link.readlink()) for link in links if link.is_symlink()]
