"""The nix engine: the rendered flake, built by the host's Nix.

The flake's lock names every input, so Nix fetches or builds the same image everywhere. What it
says meanwhile becomes progress (nixlog.py); what it leaves in its store is kept from its garbage
collector by a root in our cache, and copied to our own store by whoever asked.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ravectl import command, files
from ravectl.engines import nixlog
from ravectl.errors import HostError, RavectlError
from ravectl.model import ImageFormat, NixSettings, SecretKind

LOCK_FILE = "flake.lock"
OLDEST = (2, 18)  # that evaluates the nixpkgs we pin
FEATURES = ("--extra-experimental-features", "nix-command flakes")
SYSTEM = "x86_64-linux"
BUILD_SECONDS = 6 * 3600.0  # without a binary cache it is a night
ASK_SECONDS = 60.0
PING_SECONDS = 20.0
CONNECT_SECONDS = "5"
INSTALL_HINT = "install Nix 2.18 or later (apt-get install nix-bin on Debian 13)"
DEBIAN_HINT = "or use --engine debian"

# image formats of NixOS that boot by themselves -> whether it is GRUB by which they do
FORMATS = {
    ImageFormat.QEMU.value: True,
    ImageFormat.RAW_EFI.value: False,
    ImageFormat.VMWARE.value: True,
    ImageFormat.VIRTUALBOX.value: True,
    ImageFormat.ISO.value: False,
    ImageFormat.AMAZON.value: True,
    ImageFormat.KUBEVIRT.value: True,
}
# the values of the flake's own VM test: shell words, in a folder where these files were made
TEST_VALUES = {
    SecretKind.PASSWORD: "test-password",
    SecretKind.WEBHOOK: "whsec_dGVzdC10ZXN0LXRlc3QtdGVzdC10ZXN0",
    SecretKind.SSH_KEY: "$(cat host)",
    SecretKind.TLS_KEY: "$(cat tls.key)",
    SecretKind.TLS_CERT: "$(cat tls.crt)",
    SecretKind.HTPASSWD: "$(cat htpasswd)",
    SecretKind.SCRAM: "$(cat scram)",
    SecretKind.COPY: "test-password",
    SecretKind.AUTHORIZED_KEYS: "$(cat host.pub)",
    SecretKind.DATES: "# none",
    SecretKind.GIVEN: "",
}


@dataclass(frozen=True)
class Build:
    """What Nix is to build, and how."""

    flake: Path
    attribute: str  # of the flake's packages
    settings: NixSettings
    offline: bool = False  # no substituters, no downloads: what is in the store must do
    rebuild: bool = False  # what is in the store already is built again and compared
    held: tuple[str, ...] = ()  # files by name that the flake takes from the store, and none makes


def attribute(hostname: str, fmt: ImageFormat) -> str:
    """The flake's package that holds a machine in a format."""
    return hostname if fmt.boots_directly else f"{hostname}-{fmt.value}"


def arguments(build: Build, link: Path | None) -> list[str]:
    """The command line of `nix build`; `link` becomes a garbage collector root. Pure."""
    settings = build.settings
    words = [
        "nix", *FEATURES, "build", f"path:{build.flake}#packages.{SYSTEM}.{build.attribute}",
        "--log-format", "internal-json",
        # what the lock does not name is a mistake, not something to look up
        "--no-update-lock-file",
        "--max-jobs", str(settings.max_jobs), "--cores", str(settings.cores),
        "--option", "connect-timeout", CONNECT_SECONDS,
    ]  # fmt: skip
    words += ["--out-link", str(link)] if link else ["--no-link"]
    for name, values in (
        ("extra-substituters", settings.substituters),
        ("extra-trusted-public-keys", settings.trusted_public_keys),
    ):
        if values:
            words += ["--option", name, " ".join(values)]
    if build.offline:
        words.append("--offline")
    if build.rebuild:
        words.append("--rebuild")
    return words


# --- the host's Nix ----------------------------------------------------------------------------


def version() -> tuple[int, ...]:
    """The version of the host's Nix; HostError when there is none, or it does not run."""
    command.find_tool("nix", INSTALL_HINT)
    result = command.run(["nix", "--version"], timeout=ASK_SECONDS, check=False)
    if result.returncode != 0:
        raise HostError(f"nix does not run (exit {result.returncode})", INSTALL_HINT)
    return version_in(result.stdout)


def version_in(text: str) -> tuple[int, ...]:
    """(2, 18, 1) of `nix (Nix) 2.18.1`; RavectlError when there is no version. Pure."""
    if found := re.search(r"\d+(\.\d+)+", text):
        return tuple(int(part) for part in found[0].split("."))
    raise RavectlError(f"nix does not say its version: {text.strip()!r}", INSTALL_HINT)


def require(oldest: tuple[int, ...] = OLDEST) -> None:
    """Raise HostError unless the host has a Nix that can build our flake."""
    seen = version()
    if seen < oldest:
        shown, need = (".".join(map(str, v)) for v in (seen, oldest))
        raise HostError(
            f"nix {shown} is too old: the flake needs {need} or later",
            f"install a newer one (Debian 13 has 2.26), {DEBIAN_HINT}",
        )


def unusable(settings: NixSettings, *, offline: bool) -> tuple[str, str] | None:
    """Why an image cannot be built here with Nix, and what mends that; None when it can.

    `offline` nobody is asked for what is in the store already.
    """
    try:
        require()
    except RavectlError as e:
        return e.message, INSTALL_HINT
    remedy = "name one that answers (nix.substituters in rave.yaml); or use what is in the store: "
    remedy += "--offline; or build all of it from source: --engine nix"
    if offline:
        return None
    caches = substituters(settings)
    if not caches:
        return "nix.conf names no substituter, and building everything here takes a night", remedy
    if not any(_answers(url) for url in caches):
        return f"no substituter answers ({', '.join(map(_shown, caches))})", remedy
    return None


def substituters(settings: NixSettings) -> tuple[str, ...]:
    """The binary caches that Nix would ask here."""
    argv = ["nix", *FEATURES, "show-config", "--json"]
    if version() >= (2, 20):
        argv = ["nix", *FEATURES, "config", "show", "--json"]
    result = command.run(argv, timeout=ASK_SECONDS, check=False)
    known: list[str] = []
    with contextlib.suppress(ValueError, KeyError, TypeError):
        known = [str(url) for url in json.loads(result.stdout)["substituters"]["value"]]
    return tuple(dict.fromkeys((*known, *settings.substituters)))


def _shown(url: str) -> str:
    """A binary cache without the password that its address may hold."""
    parts = urlsplit(url)
    return parts.hostname or parts.path


def _answers(url: str) -> bool:
    """Whether a binary cache can be asked for paths."""
    if url.startswith("file://"):
        # asked, Nix would make the folder
        return (Path(urlsplit(url).path) / "nix-cache-info").is_file()
    options = ["--option", "connect-timeout", CONNECT_SECONDS, "--option", "download-attempts", "1"]
    try:
        result = command.run(
            ["nix", *FEATURES, "store", "ping", "--store", url, *options],
            timeout=PING_SECONDS,
            check=False,
        )
    except RavectlError:
        return False
    return result.returncode == 0


# --- building ----------------------------------------------------------------------------------


def build(
    wanted: Build,
    link: Path | None,
    say: Callable[[str], None],
    *,
    oldest: tuple[int, ...] = OLDEST,
) -> None:
    """Build a package of the flake; `link` points to it afterwards.

    `say` gets a line of progress whenever there is something new. Raises HostError when this
    host has no fitting Nix, RavectlError with the last lines of what failed.
    """
    require(oldest)
    log = nixlog.Log()

    def take(line: str) -> None:
        log.feed(line)
        say(log.status())

    result = command.run(
        arguments(wanted, link), timeout=BUILD_SECONDS, check=False, on_line=take,
        keep_lines=nixlog.TAIL_LINES,
    )  # fmt: skip
    if result.returncode != 0:
        raise failure(log, wanted)


def failure(log: nixlog.Log, wanted: Build) -> RavectlError:
    """What is to be said of a build that failed. Pure."""
    first = (log.errors or ["nix build failed"])[0].splitlines()[0]
    if "may not be deterministic" in first:
        return RavectlError(
            "two builds of the same inputs differ", "report it: a build must give the same bits",
            details="\n".join(log.errors),
        )  # fmt: skip
    if log.failed and (name := log.failed[0].name) in wanted.held:
        return RavectlError(
            f"{name} is not in Nix's store, and Nix cannot fetch it",
            "build once without --offline: npm fetches it then",
        )
    if log.failed:
        # newer ones say in a line of its own why
        why = [w.strip() for w in log.errors[0].splitlines() if w.strip().startswith("Reason:")]
        return RavectlError(
            f"building {log.failed[0].name} failed",
            "see the whole log: nix log of the derivation below",
            details="\n".join(filter(None, (log.tail(), first, *why))),
        )
    if any("unable to download" in text for text in (*log.warnings, *log.errors)):
        hint = "check that the substituters answer"
        if not wanted.offline:
            hint += "; what is in the store already can be used with --offline"
        return RavectlError(
            "Nix could not download what it needs", hint,
            details="\n".join((*log.warnings, *log.errors)[-nixlog.TAIL_LINES :]),
        )  # fmt: skip
    return RavectlError(
        f"nix build failed: {first}",
        "see the flake itself: ravectl render --engine nix DIR",
        details="\n".join(log.errors[1:]) or log.tail(),
    )


def holds(name: str, integrity: str) -> bool:
    """Whether the store has a file of this name and hash (SRI, sha512)."""
    digest = base64.b64decode(integrity.removeprefix("sha512-")).hex()
    argv = ["nix-store", "--print-fixed-path", "sha512", digest, name]
    path = command.run(argv, timeout=ASK_SECONDS).stdout.strip()
    known = command.run(["nix-store", "--check-validity", path], timeout=ASK_SECONDS, check=False)
    return known.returncode == 0


def hold(path: Path) -> None:
    """Copy a file into the store, where a derivation that has its name and sha512 finds it."""
    command.run(["nix-store", "--add-fixed", "sha512", path])


def root_of(cache: Path, digest: str) -> Path:
    """The link that keeps an image's inputs from Nix's garbage collector."""
    return files.make_dir(cache / "nix" / "roots") / digest


def forget_roots(cache: Path, keep: Collection[str]) -> None:
    """Let Nix's garbage collector have what belongs to images that are no more."""
    for link in (cache / "nix" / "roots").glob("*"):
        if link.name not in keep:
            link.unlink(missing_ok=True)


@dataclass(frozen=True)
class Built:
    """What a package of the flake holds."""

    folder: Path

    def disk(self, fmt: ImageFormat) -> Path:
        """The disk; a package that boots directly has a qcow2."""
        name = ImageFormat.QCOW2 if fmt.boots_directly else fmt
        return self.folder / f"disk.{name.value}"

    @property
    def kernel(self) -> Path:
        """The kernel that QEMU is given."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initrd that QEMU is given."""
        return self.folder / "initrd"

    @property
    def cmdline(self) -> str:
        """The kernel's command line."""
        return (self.folder / "cmdline").read_text().strip()

    @property
    def closure(self) -> tuple[str, ...]:
        """The store paths that the machine consists of."""
        return tuple((self.folder / "store-paths").read_text().split())


def copy(source: Path, target: Path) -> None:
    """Copy a file of the Nix store: writable, with its holes, its time that of now."""
    command.run(["cp", "--sparse=always", "--reflink=auto", "--dereference", source, target])
    target.chmod(0o644)


# --- the lock ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pin:
    """An input as flake.lock names it."""

    name: str
    revision: str
    nar_hash: str


def pins(text: str, where: Path) -> tuple[Pin, ...]:
    """The inputs that a flake.lock names; RavectlError when it is damaged. Pure."""
    try:
        nodes = json.loads(text)["nodes"]
        found = {name: nodes[node]["locked"] for name, node in nodes["root"]["inputs"].items()}
        # Nix would look one up that the lock does not name
        for name in ("nixpkgs", "sops-nix"):
            found[name]
        return tuple(Pin(n, str(v["rev"]), str(v["narHash"])) for n, v in sorted(found.items()))
    except (ValueError, KeyError, TypeError) as e:
        raise RavectlError(
            f"{where} is damaged: {e}", f"restore it from git, or go back to ours: rm '{where}'"
        ) from None


def updated_lock(flake: Path, *, oldest: tuple[int, ...] = OLDEST) -> str:
    """The text of a flake.lock with today's revisions; `flake` is a writable folder."""
    require(oldest)
    command.run(
        ["nix", *FEATURES, "flake", "update", *_flake_argument(flake)],
        timeout=BUILD_SECONDS,
        hint="check that this host reaches the flake's inputs",
    )
    return (flake / LOCK_FILE).read_text()


def _flake_argument(flake: Path) -> list[str]:
    # `nix flake update DIR` became `--flake DIR` when arguments became names of inputs
    return ["--flake", f"path:{flake}"] if version() >= (2, 19) else [f"path:{flake}"]


@contextlib.contextmanager
def written(write: Callable[[Path], None]) -> Iterator[Path]:
    """A folder with a flake in it, gone afterwards."""
    with files.staging(files.private_tmp(2**24), "ravectl-flake") as stage:
        folder = stage / "flake"
        folder.mkdir()
        write(folder)
        yield folder
