"""Images: built by an engine, kept in a store, addressed by the digest of what went in.

A published image is never changed. It is made in a folder beside the store and renamed into
it, so that an image is there whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ravectl import console, files, model, vault
from ravectl.engines import debian, nix
from ravectl.errors import RavectlError
from ravectl.model import EngineName, Image, ImageFormat, Plan, RenderedTree
from ravectl.render import render, write_tree

MANIFEST = "image.json"
IMAGE_BYTES = 3 * 2**30  # of disk while an image is made: raw and converted, measured 2.3 GB


@dataclass(frozen=True)
class Inputs:
    """What an image is made from; its digest is the image's address."""

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


def render_debian(plan: Plan) -> RenderedTree:
    """The configuration layer of a Plan for Debian."""
    return render(
        files.find_data("templates") / "debian",
        plan,
        accounts=plan.accounts,
        required=vault.required(plan),
        bundle_magic=vault.MAGIC,
    )


def render_nixos(plans: tuple[Plan, ...], flake_lock: str | None = None) -> RenderedTree:
    """The flake of these Plans: a machine for each, by its host name.

    `flake_lock` is the text of a flake.lock that takes the place of the one we ship.
    """
    folder = files.find_data("templates") / "nixos"
    found = []
    for f in render(
        folder, plans[0], manifest="flake.yaml", plans=plans, formats=nix.FORMATS
    ).files:
        if f.path == nix.LOCK_FILE and flake_lock is not None:
            f = replace(f, content=flake_lock)
        found.append(f)
    for plan in plans:
        machine = render(
            folder,
            plan,
            manifest="machine.yaml",
            required=vault.required(plan),
            bundle_magic=vault.MAGIC,
            made=nix.TEST_VALUES,
        )
        found += [replace(f, path=f"modules/{plan.hostname}/{f.path}") for f in machine.files]
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
    tree = render_debian(plan)
    base = debian.ensure_base(files.cache_dir(), plan.accounts, fresh=fresh, accept=accept)
    return Inputs(plan, tree, base, fmt, compress)


def ensure_image(inputs: Inputs) -> tuple[Image, bool]:
    """The image of these inputs and whether it had to be made.

    Raises HostError when there is no space, RavectlError when a step fails; then nothing is
    left but the cached base.
    """
    store = files.make_dir(store_dir())
    folder = store / inputs.digest
    if found := _stored(folder):
        return found, False
    debian.require_root()
    with files.lock(store / "lock", "the image store", wait=True):
        if found := _stored(folder):
            return found, False
        with files.staging(store, "making") as stage:
            files.require_space(store, IMAGE_BYTES, "an image")
            make_image(inputs, stage / "image")
            files.remove_tree(folder)
            (stage / "image").rename(folder)
    return load(folder), True


def store_dir() -> Path:
    """Where images are kept, a folder for each."""
    return files.cache_dir() / "images"


def _stored(folder: Path) -> Image | None:
    if not folder.exists():
        return None
    try:
        found = load(folder)
    except RavectlError as e:
        console.note(f"{e.message}: making it again")
        return None
    os.utime(folder)  # gc spares what was just asked for
    return found


def make_image(inputs: Inputs, target: Path) -> None:
    """Make the image of these inputs in the new folder `target`."""
    target.mkdir()
    disk = target / f"disk.{inputs.format}"
    with files.staging(files.fast_tmp(2 * 2**30), "ravectl-root") as work:
        root = work / "root"
        with console.step("configuration"):
            debian.copy_root(inputs.base.root, root)
            write_tree(inputs.tree, root)
        with console.step("file system"):
            raw = disk if inputs.format is ImageFormat.RAW else work / "disk.raw"
            debian.make_filesystem(root, raw, inputs.plan.machine.disk_gb, inputs.plan.hostname)
        if raw != disk:
            with console.step(f"{inputs.format} disk"):
                debian.convert(raw, disk, inputs.format, compress=inputs.compress)
    shutil.copy(inputs.base.kernel, target / "vmlinuz")
    shutil.copy(inputs.base.initrd, target / "initrd")
    files.write_json(target / MANIFEST, _manifest(inputs, target, disk))


def _manifest(inputs: Inputs, target: Path, disk: Path) -> dict[str, object]:
    parts = [disk, target / "vmlinuz", target / "initrd"]
    return {
        "digest": inputs.digest,
        "engine": EngineName.DEBIAN,
        "format": inputs.format,
        "cmdline": debian.CMDLINE,
        "plan": model.to_json(inputs.plan),
        "packages": [[p.name, p.version, p.sha256] for p in inputs.base.packages],
        "sizes": {p.name: p.stat().st_size for p in parts},
        "hashes": {p.name: files.digest_file(p) for p in parts},
    }


def load(folder: Path) -> Image:
    """An image of the store; RavectlError when it is missing, truncated or of another version."""
    remedy = f"remove it and build again: rm -r {folder}"
    if not (folder / MANIFEST).exists():
        raise RavectlError(f"there is no image {folder.name}", "build it: ravectl build")
    m = files.read_json(folder / MANIFEST)
    try:
        fmt = ImageFormat(m["format"])
        image = Image(
            digest=m["digest"],
            engine=EngineName(m["engine"]),
            format=fmt,
            folder=folder,
            disk=folder / f"disk.{fmt}",
            kernel=folder / "vmlinuz",
            initrd=folder / "initrd",
            cmdline=m["cmdline"],
            plan=model.from_json(Plan, m["plan"]),
            sizes=m["sizes"],
            hashes=m["hashes"],
        )
    except (KeyError, ValueError, TypeError) as e:
        raise RavectlError(f"image {folder.name} has a damaged manifest ({e})", remedy) from None
    for name, size in image.sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise RavectlError(f"image {folder.name} is damaged: {name} is truncated", remedy)
    return image


def find(digest: str) -> Image:
    """The image addressed by `digest`; RavectlError when the store has none."""
    return load(store_dir() / digest)


# --- who uses them -----------------------------------------------------------------------------


def add_root(uuid: str, folder: Path) -> None:
    """Remember that the instance in `folder` uses the store, so that gc asks it before."""
    link = files.make_dir(files.cache_dir() / "roots") / uuid
    link.unlink(missing_ok=True)
    link.symlink_to(folder)


def roots() -> list[Path]:
    """The folders of all instances that use the store; those that are gone are forgotten."""
    found = []
    parent = files.cache_dir() / "roots"
    for link in sorted(parent.iterdir()) if parent.is_dir() else []:
        if link.is_dir():
            found.append(link.readlink())
        elif link.is_symlink():
            link.unlink()
    return found
