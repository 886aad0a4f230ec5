"""Whose images this workspace takes: manifests signed by SSH keys, and files held against them.

.rave/signing/id_ed25519     the key that this workspace signs the images by that it makes
allowed_signers              whom the team trusts beside it; made to be committed
~/.config/ravectl/allowed_signers    the keys of this account's workspaces, kept by ravectl
IMAGE/signatures/*.sig       signatures of IMAGE/image.json

A signature is made and verified by ssh-keygen (`-Y`), so the files are OpenSSH's own. Why this is
trusted, and what it does not hold against: docs/adr/0011.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ravectl import command, console, credentials, files
from ravectl.errors import RavectlError, UsageError
from ravectl.model import MANIFEST, Image
from ravectl.workspace import Workspace

NAMESPACE = "rave-image"  # a signature made for something else (git, mail) says nothing of images
SIGNATURES = "signatures"
KEY_VARIABLE = "RAVECTL_SIGNING_KEY"
SIGNERS_FILE = "allowed_signers"
MAX_SIGNATURES = 64  # of an image that are looked at: who fills a store must not slow us down
SETTLED_NS = 2_000_000_000  # a file changed this recently may change again at the same stamp
# Those that change the ctime with every change, also of a mapped page: a tmpfs does not, and what
# is not known is measured each time.
STAMPING = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs"})
SECONDS = 30.0  # for ssh-keygen, which needs some 0.05 s
_OWN, _ACCOUNT = "this workspace", "another workspace of this account"


class UntrustedError(RavectlError):
    """Nobody whom this workspace trusts has signed the image: it was not made here."""


class AlteredError(RavectlError):
    """Somebody whom we trust signed the image, and it is not what was signed."""


@dataclass(frozen=True)
class Trusted:
    """Those whose signature counts, from one file of OpenSSH's form (ssh-keygen(1))."""

    name: str  # of the source, for a person; "" when each principal has a name of its own
    file: Path


# --- keys --------------------------------------------------------------------------------------


def key_file(workspace: Workspace) -> Path:
    """The private key that this workspace signs by, made if need be.

    RAVECTL_SIGNING_KEY names another file (a public key whose private half an ssh-agent has will
    do). Raises RavectlError when the key is damaged, HostError when it cannot be written.
    """
    if named := os.environ.get(KEY_VARIABLE):
        path = files.expand(named).absolute()
        if not path.is_file():
            raise RavectlError(
                f"{KEY_VARIABLE} names no file: {path}",
                f"give it the path of an SSH key, or leave it out: unset {KEY_VARIABLE}",
            )
        return path
    workspace.prepare()
    return credentials.ensure_signing_key(workspace.signing_dir).file


def signer_line(workspace: Workspace, principal: str) -> str:
    """The line of an allowed_signers file by which others take what this workspace signs.

    Raises UsageError for a name that would make another line of it.
    """
    if not re.fullmatch(r"[\w.@+-]+", principal):
        raise UsageError(
            f"{principal!r} cannot be the name of a signer",
            "use letters, digits and . @ + - _, as in ci@example.org",
        )
    return f'{principal} namespaces="{NAMESPACE}" {public_key(key_file(workspace))}'


def public_key(key: Path) -> str:
    """The public half of a key file, as "TYPE BASE64"; RavectlError when it cannot be read."""
    beside = key if key.suffix == ".pub" else key.with_name(f"{key.name}.pub")
    if beside.is_file():
        text = beside.read_text(errors="replace")
    else:
        done = _keygen(["-y", "-P", "", "-f", key])
        if done.returncode != 0:
            raise _unusable(key, done)
        text = done.stdout
    words = text.split()[:2]
    if len(words) != 2 or not credentials.is_ssh_public(" ".join(words)):
        raise RavectlError(f"{beside} is no public SSH key", f"see to it: ls -l '{beside}'")
    return " ".join(words)


def account_signers() -> Path:
    """The list of the keys of this account's workspaces, which share its store of images."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return files.expand(base) / "ravectl" / SIGNERS_FILE


def _remember(workspace: Workspace, public: str) -> None:
    path = account_signers()
    files.make_private_dir(path.parent)
    with files.lock(path.with_name(f".{path.name}.lock"), str(path), wait=True):
        known = path.read_text() if path.exists() else "# made by ravectl: keys of workspaces\n"
        if public not in known:
            place = shlex.quote(str(workspace.root)).replace("\n", " ")
            line = f'workspace namespaces="{NAMESPACE}" {public} {place}\n'
            files.write_atomic(path, known + line, files.PRIVATE_FILE)


def _keygen(words: list[str | Path], stdin: bytes = b"") -> command.Result:
    # no agent's window and no terminal: what needs a person fails at once
    return command.run(
        ["ssh-keygen", *words], stdin=stdin, check=False, timeout=SECONDS,
        env={**os.environ, "SSH_ASKPASS_REQUIRE": "never"},
        hint="install it: apt-get install openssh-client",
    )  # fmt: skip


def _unusable(key: Path, done: command.Result) -> RavectlError:
    return RavectlError(
        f"the signing key {key} cannot be used",
        f"see why: ssh-keygen -y -f {shlex.quote(str(key))}; one with a passphrase needs an agent",
        details=done.stderr,
    )


# --- sign --------------------------------------------------------------------------------------


def sign(workspace: Workspace, folder: Path) -> Path:
    """Sign the manifest in an image's folder by this workspace's key; where the signature is.

    Whoever signs vouches for the image: by having made it, or by having been told to.
    """
    key = key_file(workspace)
    public = public_key(key)
    manifest = (folder / MANIFEST).read_bytes()
    done = _keygen(["-Y", "sign", "-n", NAMESPACE, "-f", key], manifest)
    if done.returncode != 0:
        raise _unusable(key, done)
    name = files.digest_bytes(public.encode())[:16]
    target = files.make_dir(folder / SIGNATURES) / f"{name}.sig"
    files.write_atomic(target, done.stdout)
    _remember(workspace, public)
    return target


# --- verify ------------------------------------------------------------------------------------


def verify(workspace: Workspace, image: Image) -> str:
    """Who of those we trust signed the image, when every byte of it is what was signed.

    Raises UntrustedError when none did, AlteredError when the manifest or a file has changed
    since, or when the image stands at another one's address.
    """
    data = (image.folder / MANIFEST).read_bytes()
    if files.digest_bytes(data) != image.manifest:
        raise _altered(image, f"{MANIFEST} changes while it is read")
    signer = _signer(workspace, image, data)
    if image.digest != image.folder.name:
        raise _altered(image, f"its manifest is that of {image.digest}")
    if missing := unsigned_parts(image):
        raise _altered(image, f"its manifest has no hash of {missing[0]}")
    for name in _differing(workspace, image):
        raise _altered(image, f"{name} is not what was signed")
    return signer


def unsigned_parts(image: Image) -> list[str]:
    """The files that QEMU would be given and that the manifest does not name. Pure."""
    needed = [image.disk]
    if image.format.boots_directly:
        needed += [image.kernel, image.initrd]
    return [p.name for p in needed if p.name not in image.hashes]


def _altered(image: Image, why: str) -> AlteredError:
    return AlteredError(
        f"image {image.digest} was changed after it was signed: {why}",
        # no rm: a machine's disk may lie on it, and is worth nothing without it
        "find out who wrote there; then move it out of the store and build again: "
        f"mv {shlex.quote(str(image.folder))} ELSEWHERE; ravectl build",
    )


def _signer(workspace: Workspace, image: Image, manifest: bytes) -> str:
    found = sorted((image.folder / SIGNATURES).glob("*.sig"))[:MAX_SIGNATURES]
    broken, said = False, ""
    with files.in_memory() as folder:
        for trusted in _trusted(workspace, folder):
            for signature in found:
                named = _keygen(["-Y", "find-principals", "-s", signature, "-f", trusted.file])
                # ssh-keygen goes past a line that it cannot read or that has expired
                said = said or "\n".join(_complaints(named.stderr))
                if named.returncode != 0 or not named.stdout.strip():
                    continue
                who = named.stdout.splitlines()[0]
                words: list[str | Path] = ["-Y", "verify", "-n", NAMESPACE, "-I", who]
                done = _keygen([*words, "-s", signature, "-f", trusted.file], manifest)
                if done.returncode == 0:
                    return trusted.name or who
                if "incorrect signature" in done.stderr:
                    broken = True
                said = said or done.stderr
    if broken:
        raise _altered(image, f"{MANIFEST} is not what was signed")
    raise _untrusted(image, workspace, signed=bool(found), said=said)


def _complaints(stderr: str) -> list[str]:
    """What ssh-keygen says of a list of signers ("FILE:LINE: ..."), not of a signature."""
    return [line for line in stderr.splitlines() if SIGNERS_FILE in line.partition(":")[0]]


def _untrusted(image: Image, workspace: Workspace, *, signed: bool, said: str) -> UntrustedError:
    how = "was signed by nobody this workspace trusts" if signed else "is not signed"
    return UntrustedError(
        f"image {image.digest} {how}",
        "make it again: ravectl build; or, if you know who made it: trust its signer by a line in "
        f"{workspace.root / SIGNERS_FILE}, or vouch for it: ravectl image sign {image.digest}",
        details=said,
    )


def _trusted(workspace: Workspace, folder: Path) -> Iterator[Trusted]:
    """The lists in the order in which they are asked: our own key first."""
    own = folder / "own"
    if os.environ.get(KEY_VARIABLE) or (workspace.signing_dir / "id_ed25519").exists():
        own.write_text(signer_line(workspace, "workspace") + "\n")
        yield Trusted(_OWN, own)
    if account_signers().is_file():
        yield Trusted(_ACCOUNT, account_signers())
    if (workspace.root / SIGNERS_FILE).is_file():
        yield Trusted("", workspace.root / SIGNERS_FILE)


# --- what was measured already -----------------------------------------------------------------

Stamp = list[int]  # device, inode, bytes, ns of the content's change, ns of any change


def stamp_of(path: Path) -> Stamp:
    """What changes when a file does. No program can set a ctime: the kernel alone does."""
    s = path.stat()
    return [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]


def known_digest(records: Mapping[str, object], path: Path, stamp: Stamp) -> str | None:
    """The digest that was measured of this very file, None when it must be measured. Pure."""
    row = records.get(str(path))
    if isinstance(row, list) and row[:-1] == stamp and isinstance(row[-1], str):
        return row[-1]
    return None


def is_settled(stamp: Stamp, now_ns: int) -> bool:
    """Whether a change from now on would show: the kernel's clock has moved on since. Pure."""
    return now_ns - stamp[4] > SETTLED_NS


def _differing(workspace: Workspace, image: Image) -> list[str]:
    """The files of the image that are not what its manifest says."""
    record = workspace.state / "measured.json"
    records = _records(record)
    rest = [n for n in image.hashes if known_digest(records, *_now(image.folder / n)) is None]
    found = {n: str(records[str(image.folder / n)][-1]) for n in image.hashes if n not in rest}
    if rest:
        with console.step("measuring the image") as step:
            for name in rest:
                step.update(name)
                found[name] = _measure(image.folder / name, records)
        kept = {p: row for p, row in records.items() if Path(p).exists()}
        workspace.prepare()
        files.write_json(record, kept, files.PRIVATE_FILE)
    return [n for n, digest in image.hashes.items() if found[n] != digest]


def _now(path: Path) -> tuple[Path, Stamp]:
    return path, stamp_of(path)


def _measure(
    path: Path, records: dict[str, list[object]], clock: Callable[[], int] = time.time_ns
) -> str:
    before, began = stamp_of(path), clock()
    digest = files.digest_file(path)
    sure = is_settled(before, began) and files.filesystem_of(path) in STAMPING
    if sure and stamp_of(path) == before:
        records[str(path)] = [*before, digest]
    else:
        records.pop(str(path), None)
    return digest


def _records(path: Path) -> dict[str, list[object]]:
    try:
        found = files.read_json(path) if path.exists() else {}
    except RavectlError:
        return {}  # it only spares work
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, list) and v}
