"""The debian engine: a Debian 13 root by mmdebstrap, a configuration layer, an ext4 image.

Two layers, so that a change of configuration costs seconds: the *base* (packages, npm parts,
accounts, kernel, initramfs), cached by the digest of its recipe, and the rendered files on top
of a copy of it. Both are the same to the bit when made again (docs/adr/0004).

Everything that mounts or runs maintainer scripts does so in namespaces of its own, so that an
interrupted build leaves neither mounts nor processes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ravectl import command, console, files
from ravectl.engines import pgcluster
from ravectl.errors import HostError, RavectlError, UsageError
from ravectl.model import Account, AptSource

SUITE = "trixie"
RECIPE = 10  # raise it when this module makes another base from the same inputs
# Newer time stamps are set to this one: 2026-01-01, before which every package of a point
# release that matters here was built, so that most keep their own.
EPOCH = 1767225600
CMDLINE = "console=ttyS0 root=/dev/vda rw quiet net.ifnames=0 panic=-1"
BASE_BYTES = 3 * 2**30  # of disk, while a base is made: measured 1.3 GB, with room to grow
MIRROR_SECONDS = 20  # a mirror that says nothing for this long is asked once more, then given up
NPM_SECONDS = 600.0
STALLED_SECONDS = 2.0 * MIRROR_SECONDS + 5
MIRROR_HINT = "check that the mirror answers (apt-get update), then build again"
MIRROR_VARIABLE = "RAVECTL_DEBIAN_MIRROR"
# Only who signs Debian may sign the lists of packages: not every key that the host's apt knows.
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
KEYRING_VARIABLE = "RAVECTL_DEBIAN_KEYRING"

PACKAGES = (
    "age",
    "apparmor",
    "auditd",
    "busybox-static",
    "ca-certificates",
    "curl",
    "dbus",
    "e2fsprogs",
    "git",
    "iproute2",
    "less",
    "linux-image-cloud-amd64",
    "mtail",
    "nftables",
    "nginx",
    "nodejs",
    "openssh-server",
    "postgresql",
    "procps",
    "prometheus",
    "prometheus-alertmanager",
    "prometheus-blackbox-exporter",
    "prometheus-nginx-exporter",
    "prometheus-node-exporter",
    "prometheus-postgres-exporter",
    "prometheus-pushgateway",
    "python3",
    "sudo",
    "systemd-sysv",
    "udev",
    "victoria-metrics",
    "zlib1g",
)


@dataclass(frozen=True)
class NpmPart:
    """A program that comes from the npm registry, pinned by version and integrity (SRI)."""

    name: str
    version: str
    integrity: str

    @property
    def tarball(self) -> str:
        """The name of the file that npm packs it as."""
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.tgz"


KANBAN = NpmPart(
    "vibe-kanban",
    "0.0.71",
    "sha512-R2BuFlaD6K+CgA6wfRl5YT80jzaZkjO2CF9XS7zT4nSo+FRa3lmqtR5iTASabNK1sal+/POnCkuTlfiQInbf8A==",
)
NPM_PARTS = (
    KANBAN,
    NpmPart(
        "@musistudio/claude-code-router",
        "2.0.0",
        "sha512-41CRIOgBtYAxY4+xBn+plXv87ghuv0kVcdTUOFcVdf2cwQMY8u+g6DJ9hX9JiSdlX3xVFpW2UFlx7xRUTx5I5g==",
    ),
)


# The dispatcher's libraries: wheels for the suite's Python, by a lock with hashes.
DISPATCHER = "opt/rave-dispatcher"
WHEELS_LOCK = "requirements-dispatcher.lock"
PYTHON = "3.13"
WHEEL_TAGS = (
    "--implementation=cp", f"--python-version={PYTHON}", "--abi=cp313", "--abi=abi3", "--abi=none",
    *(f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 34)),
    "--platform=manylinux2014_x86_64",
)  # fmt: skip


@dataclass(frozen=True)
class Package:
    """An installed Debian package."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Base:
    """A cached base layer."""

    key: str
    root: Path
    kernel: Path
    initrd: Path
    packages: tuple[Package, ...]


def packages(*, forwarding: bool, grafana: AptSource | None = None) -> tuple[str, ...]:
    """The packages of a base: one whose journal is sent elsewhere has what sends it, and one has
    Grafana for which somebody named a source of it."""
    sender = ("systemd-journal-remote",) if forwarding else ()
    return (*PACKAGES, *sender, *(("grafana",) if grafana else ()))


def base_key(
    accounts: tuple[Account, ...], *, forwarding: bool = False, grafana: AptSource | None = None
) -> str:
    """What a base is addressed by: the digest of its recipe (not of a mirror's state)."""
    recipe = [
        RECIPE, SUITE, EPOCH, packages(forwarding=forwarding, grafana=grafana),
        [[p.name, p.version, p.integrity] for p in NPM_PARTS],
        [[a.name, a.uid, a.home, a.login] for a in accounts],
        files.find_data(WHEELS_LOCK).read_text(), WHEEL_TAGS,
        *([[grafana.line, grafana.key]] if grafana else []),
    ]  # fmt: skip
    return files.digest_value(recipe)[:16]


def host_mirror(sources: Path = Path("/etc/apt")) -> str:
    """The Debian mirror that the machine's packages come from.

    RAVECTL_DEBIAN_MIRROR if that is set, else the one that this host's own apt uses. Raises
    HostError when apt has none, UsageError when the variable holds no URI.
    """
    if chosen := os.environ.get(MIRROR_VARIABLE):
        # mmdebstrap would take a file or a line of sources.list too, as one with [trusted=yes]
        if not re.fullmatch(r"(https?|file|copy)://?[^\s\[\]\"]+", chosen):
            raise UsageError(
                f"{MIRROR_VARIABLE} is no URI of a mirror: {chosen}",
                "give it one as http://HOST/debian, without options",
            )
        return chosen
    texts = [
        p.read_text(errors="replace")
        for p in (sources / "sources.list", *sorted((sources / "sources.list.d").glob("*")))
        if p.is_file()
    ]
    if mirror := mirror_in("\n".join(texts)):
        return mirror
    raise HostError(
        "this host's apt names no Debian mirror",
        f"add one to /etc/apt/sources.list.d (Types, URIs, Suites), or set {MIRROR_VARIABLE}",
    )


def archive_keyring() -> Path:
    """The keys by which the mirror's lists must be signed; HostError when the host lacks them."""
    path = Path(os.environ.get(KEYRING_VARIABLE) or KEYRING)
    if not path.is_absolute() or not path.is_file() or set(str(path)) & set('" []'):
        raise HostError(
            f"there is no keyring {path} to check Debian's packages by",
            "install it: apt-get install debian-archive-keyring; or name another one, by an "
            f"absolute path: {KEYRING_VARIABLE}",
        )
    return path


def signature_fault(said: str) -> str | None:
    """What apt found wrong with the signature of a mirror's lists; None when it was not that.

    By apt's own words (methods/gpgv.cc and apt-pkg/acquire-item.cc of apt 2.6 to 3.0). Pure.
    """
    words = r"NO_PUBKEY|BADSIG|EXPKEYSIG|REVKEYSIG|EXPSIG|is not signed|invalid signature"
    words += r"|signatures? couldn't be verified|signatures? were invalid|Missing key"
    words += r"|Sub-process /usr/bin/sqv returned an error|split up .* into data and signature"
    words += r"|Clearsigned file isn't valid"
    found = re.search(rf"^.*(?:{words}).*$", said, re.M)
    return found[0].strip() if found else None


def mirror_in(text: str) -> str | None:
    """The first archive of Debian's main releases in apt's sources, of either format."""
    found = re.findall(r"^URIs:\s*(\S+)", text, re.M)
    found += re.findall(r"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s", text, re.M)
    for uri in found:
        if re.search(r"/debian/?$", uri):
            return str(uri)
    return None


def ensure_base(
    cache: Path,
    accounts: tuple[Account, ...],
    *,
    forwarding: bool = False,
    grafana: AptSource | None = None,
    fresh: bool = False,
    accept: Callable[[Base], None] = lambda _: None,
) -> Base:
    """The base layer from the cache, or made now (always if `fresh`).

    `accept` may refuse a base that was just made, by raising, before it takes the place of the
    one in the cache. Raises HostError when this host lacks a tool, a right or space,
    RavectlError when a package cannot be had.
    """
    key = base_key(accounts, forwarding=forwarding, grafana=grafana)
    folder = cache / "debian" / f"base-{key}"
    if not fresh and (found := _cached(folder, key)):
        return found
    files.require_space(cache, BASE_BYTES, "a Debian base")
    require_root()
    files.make_dir(cache / "debian")
    with files.lock(cache / "debian" / "lock", "the cache of Debian bases", wait=True):
        if not fresh and (found := _cached(folder, key)):
            return found
        with files.staging(cache / "debian", "making") as stage:
            accept(make_base(stage, accounts, forwarding=forwarding, grafana=grafana))
            files.remove_tree(folder)
            stage.joinpath("base").rename(folder)
    return read_base(folder, key)


def require_root() -> None:
    """Raise HostError unless this process may make a Debian root."""
    if os.geteuid() != 0:
        # not sudo for this one command: what root makes in a workspace, only root can use
        raise HostError(
            "the debian engine needs root to make a Debian root",
            "work as root altogether: sudo -i, in a folder of root's; or: --engine nix",
        )


def _cached(folder: Path, key: str) -> Base | None:
    if not folder.exists():
        return None
    try:
        return read_base(folder, key)
    except RavectlError as e:
        console.note(f"{e.message}: making it again")
        return None


def read_base(folder: Path, key: str) -> Base:
    """A base that is in the cache; RavectlError when it is damaged."""
    damaged = RavectlError(
        f"the Debian base {key} in the cache is damaged", f"remove it: rm -r '{folder}'"
    )
    try:
        rows = json.loads((folder / "packages.json").read_text())
        base = Base(
            key=key,
            root=folder / "root",
            kernel=folder / "vmlinuz",
            initrd=folder / "initrd",
            packages=tuple(Package(*row) for row in rows),
        )
    except (OSError, ValueError, TypeError):
        raise damaged from None
    if not (base.kernel.is_file() and base.initrd.is_file() and (base.root / "usr").is_dir()):
        raise damaged
    return base


def make_base(
    stage: Path,
    accounts: tuple[Account, ...],
    *,
    forwarding: bool = False,
    grafana: AptSource | None = None,
) -> Base:
    """Make a base in the folder `stage`/base; raises as `ensure_base` does."""
    for program in ("mmdebstrap", "npm"):  # a host that lacks one learns it now, not at its turn
        command.find_tool(program)
    base = stage / "base"
    root = base / "root"
    base.mkdir()
    with contextlib.ExitStack() as stack:
        # npm waits for its registry while dpkg works
        wheels = stack.enter_context(_fetching_wheels(stage / "wheels"))
        fetching = [(part, stack.enter_context(_fetching(part, stage))) for part in NPM_PARTS]
        with console.step("Debian packages") as step:
            wanted = packages(forwarding=forwarding, grafana=grafana)
            _bootstrap(root, wanted, _mirrors(stage, grafana), step.update)
        rows = _installed(root)
        with console.step("npm parts") as step:
            for part, running in fetching:
                step.update(f"{part.name} {part.version}")
                _unpack_part(part, _fetched(part, running, stage), root, stage)
        with console.step("Python parts"):
            wheels.result()
            unpack_wheels(stage / "wheels", root / DISPATCHER / "site-packages")
            compile_python(root, f"{DISPATCHER}/site-packages")
    with console.step("accounts, database, initramfs"):
        _add_accounts(root, accounts)
        pgcluster.make_cluster(root, EPOCH)
        shutil.copy(next(root.glob("boot/vmlinuz-*")), base / "vmlinuz")
        _make_initrd(root, stage / "initramfs", base / "initrd")
        _forget_the_build(root)
    (base / "packages.json").write_text(json.dumps(rows))
    return read_base(base, base_key(accounts, forwarding=forwarding, grafana=grafana))


def _mirrors(stage: Path, grafana: AptSource | None) -> list[str]:
    """What packages come from, as mmdebstrap takes it: Debian's mirror, and Grafana's source."""
    mirror = f'deb [signed-by="{archive_keyring()}"] {host_mirror()} {SUITE} main'
    if grafana is None:
        return [mirror]
    source = stage / "grafana.sources"
    source.write_text(apt_source(grafana))
    return [mirror, str(source)]


def apt_source(source: AptSource) -> str:
    """A package source as a file of apt's sources.list.d, with the key within. Pure."""
    uri, suite, *components = source.line.split()
    key = "".join(f" {line or '.'}\n" for line in source.key.splitlines())
    return (
        f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {' '.join(components)}\n"
        f"Architectures: amd64\nSigned-By:\n{key}"
    )


def _bootstrap(
    root: Path, wanted: tuple[str, ...], mirrors: list[str], say: Callable[[str], None]
) -> None:
    hooks = [
        # the package would make a cluster that differs each time; pgcluster makes ours
        'mkdir -p "$1/etc/postgresql-common"',
        'echo "create_main_cluster = false" > "$1/etc/postgresql-common/createcluster.conf"',
    ]
    argv: list[str | os.PathLike[str]] = [
        "mmdebstrap", "--mode=root", "--variant=apt", "--architectures=amd64",
        "--components=main", f"--include={','.join(wanted)}",
        "--aptopt=APT::Install-Recommends \"false\"",
        "--aptopt=Acquire::Languages \"none\"",
        f"--aptopt=Acquire::http::Timeout \"{MIRROR_SECONDS}\"",
        f"--aptopt=Acquire::https::Timeout \"{MIRROR_SECONDS}\"",
        # apt's own defaults, so that nothing else decides
        "--aptopt=Acquire::AllowInsecureRepositories \"false\"",
        "--aptopt=Acquire::AllowDowngradeToInsecureRepositories \"false\"",
        "--aptopt=APT::Get::AllowUnauthenticated \"false\"",
        "--aptopt=Acquire::Retries \"1\"",
        *(f"--aptopt={line}" for line in _host_apt_options()),
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("doc", "man", "locale", "info")),
        *(f"--setup-hook={h}" for h in hooks),
        "--skip=cleanup/apt/lists",
        SUITE, root, *mirrors,
    ]  # fmt: skip
    watch = _Bootstrapping(root, say)
    result = command.run(
        command.isolated(argv),
        env={
            **os.environ,
            "SOURCE_DATE_EPOCH": str(EPOCH),
            "TMPDIR": str(files.fast_tmp(2**30)),
            "INITRD": "No",  # no initramfs is made: ours replaces it
        },
        timeout=1800,
        on_line=watch.line,
        on_quiet=watch.quiet,
        check=False,
    )
    if result.returncode != 0:
        raise _bootstrap_failure(result)


def _bootstrap_failure(result: command.Result) -> RavectlError:
    if fault := signature_fault(result.stderr):
        return RavectlError(
            f"the mirror {host_mirror()} is not signed by a key of {archive_keyring().name}",
            f"use a mirror of Debian ({MIRROR_VARIABLE}); if you sign your own, name its keyring: "
            f"{KEYRING_VARIABLE}",
            details=fault,
        )
    return command.failure(result, MIRROR_HINT)


class _Bootstrapping:
    """Follows mmdebstrap, and ends it when what it downloads stands still.

    apt itself would go on with the next package, and wait as long for each of two hundred.
    """

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self._root, self._say = root, say
        self._began("")

    def _began(self, phase: str) -> None:
        self._phase, self._unpacked = phase, self._dpkg_log()
        self._seen, self._since = -1, time.monotonic()

    def line(self, line: str) -> None:
        """Take a line that mmdebstrap printed."""
        if line.startswith("I: "):
            self._began(line.removeprefix("I: "))
            self._say(self._phase)

    def quiet(self) -> None:
        """Look at the download; raises RavectlError when the mirror stopped answering."""
        if not self._downloads():
            return
        seen = sum(files.size_of(p) for p in self._root.glob("var/cache/apt/archives/**/*"))
        seen += sum(files.size_of(p) for p in self._root.glob("var/lib/apt/lists/**/*"))
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        elif time.monotonic() - self._since > STALLED_SECONDS:
            raise RavectlError(
                f"the mirror sent nothing for {STALLED_SECONDS:.0f} s", MIRROR_HINT,
                details=self._phase,
            )  # fmt: skip

    def _downloads(self) -> bool:
        if self._phase.startswith("downloading"):
            return True
        # apt downloads everything before dpkg starts
        return self._phase.startswith("installing remaining") and (
            self._dpkg_log() == self._unpacked
        )

    def _dpkg_log(self) -> int:
        return files.size_of(self._root / "var/log/dpkg.log")


def _host_apt_options() -> list[str]:
    """What this host told its apt about reaching archives (proxies, validity of snapshots)."""
    dump = command.run(["apt-config", "dump"], check=False).stdout
    wanted = re.compile(r"^Acquire::(https?::Proxy|https::CaInfo|Check-Valid-Until|Check-Date)\b")
    return [
        line.strip().removesuffix(";")
        for line in dump.splitlines()
        if wanted.match(line) and '""' not in line
    ]


def _installed(root: Path) -> list[tuple[str, str, str]]:
    """Name, version and SHA-256 of every installed package, by the signed package lists."""
    status = (root / "var/lib/dpkg/status").read_text()
    wanted = {(s["Package"], s["Version"]) for s in _stanzas(status)}
    found: dict[tuple[str, str], str] = {}
    for listing in sorted((root / "var/lib/apt/lists").glob("*_Packages")):
        for s in _stanzas(listing.read_text()):
            if (s["Package"], s["Version"]) in wanted:
                found[s["Package"], s["Version"]] = s["SHA256"]
    missing = wanted - set(found)
    if missing:
        name, version = sorted(missing)[0]
        raise RavectlError(
            f"package {name} {version} is installed but in no package list of the mirror",
            "build again: the mirror changed while it was read",
        )
    return sorted((n, v, h) for (n, v), h in found.items())


def _stanzas(text: str) -> list[dict[str, str]]:
    keep = re.compile(r"^(Package|Version|SHA256): (.+)$", re.M)
    return [
        {m[1]: m[2] for m in keep.finditer(block)} for block in text.split("\n\n") if block.strip()
    ]


def fetch_part(part: NpmPart, into: Path) -> Path:
    """A part's tarball, downloaded by the host's npm and held against its pinned integrity."""
    with _fetching(part, into) as running:
        return _fetched(part, running, into)


def _fetching(part: NpmPart, into: Path) -> contextlib.AbstractContextManager[command.Background]:
    """Have the host's npm download a part, meanwhile."""
    spec = f"{part.name}@{part.version}"
    return command.background(
        ["npm", "pack", "--json", "--ignore-scripts", "--pack-destination", into, spec],
        cwd=into,
        timeout=NPM_SECONDS,
        hint=f"check that npm reaches its registry: npm view {spec} version",
    )


def _fetched(part: NpmPart, running: command.Background, into: Path) -> Path:
    """The downloaded tarball, held against its pinned integrity."""
    packed = str(json.loads(running.result().stdout)[0]["filename"])
    tarball = into / packed.replace("@", "").replace("/", "-")
    check_integrity(tarball, part)
    return tarball


def check_integrity(tarball: Path, part: NpmPart) -> None:
    """Raise RavectlError unless the tarball has the integrity that `part` pins."""
    with tarball.open("rb") as f:
        digest = hashlib.file_digest(f, "sha512").digest()
    seen = "sha512-" + base64.b64encode(digest).decode()
    if seen != part.integrity:
        raise RavectlError(
            f"{part.name}@{part.version} from npm is not what was pinned ({seen[:24]}...)",
            "do not use it: the registry serves another file under this version; report it",
        )


def _unpack_part(part: NpmPart, tarball: Path, root: Path, stage: Path) -> None:
    short = part.name.rpartition("/")[2]
    target = root / "opt" / short
    target.mkdir(parents=True)
    with tarfile.open(tarball) as tar:
        if short == "vibe-kanban":
            unpack_below(tar, "package/dist/linux-x64/", stage / short)
            with zipfile.ZipFile(stage / short / "vibe-kanban.zip") as z:
                z.extract("vibe-kanban", target)
            (target / "vibe-kanban").chmod(0o755)
            return
        unpack_below(tar, "package/dist/", target / "dist")


def unpack_below(tar: tarfile.TarFile, prefix: str, target: Path) -> None:
    """Write the regular files below `prefix` to `target`, modes 755 or 644, owned by the caller.

    Not tarfile's filters: Debian 12's Python (3.11.2) is older than they are. Raises RavectlError
    for a file that would lie elsewhere.
    """
    for member in tar.getmembers():
        if not (member.isfile() and member.name.startswith(prefix)):
            continue
        place = Path(member.name.removeprefix(prefix))
        content = tar.extractfile(member)
        if place.is_absolute() or ".." in place.parts or content is None:
            raise RavectlError(
                f"a part from npm would write to {member.name}", "do not use it; report it"
            )
        path = target / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.read())
        path.chmod(0o755 if member.mode & 0o100 else 0o644)


def _fetching_wheels(into: Path) -> contextlib.AbstractContextManager[command.Background]:
    """Have pip download the dispatcher's libraries for the machine's Python, meanwhile.

    Wheels only: nothing is built, and none of their code runs on this host.
    """
    into.mkdir()
    return command.background(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--only-binary=:all:", "--require-hashes", *WHEEL_TAGS,
         "--dest", into, "--requirement", files.find_data(WHEELS_LOCK)],
        cwd=into,
        env={**os.environ, "TMPDIR": str(into)},  # one that is killed leaves its folders there
        timeout=NPM_SECONDS,
        hint="check that pip reaches its index: python -m pip download --no-deps uvicorn",
    )  # fmt: skip


def unpack_wheels(folder: Path, target: Path) -> None:
    """Lay the wheels of a folder out as one site-packages; RavectlError for one that strays."""
    target.mkdir(parents=True)
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                place = _place_in_site(name)
                if name.endswith("/") or place is None:
                    continue
                path = target / place
                if ".." in path.parts or path.exists():
                    raise RavectlError(
                        f"{wheel.name} would overwrite {place}", f"check {WHEELS_LOCK}"
                    )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def _place_in_site(name: str) -> str | None:
    """Where a wheel's file belongs; None for what is none of the library's own."""
    first, _, rest = name.partition("/")
    if not first.endswith(".data"):
        return name
    kind, _, inner = rest.partition("/")
    return inner if kind in ("purelib", "platlib") else None


def compile_python(root: Path, folder: str) -> None:
    """Compile the modules below a folder of a root, by the root's own Python.

    A service cannot write beside its code, and would compile it anew at each start: seconds
    under emulation. The result does not depend on times (unchecked-hash).
    """
    command.run(
        ["chroot", root, "/usr/bin/python3", "-m", "compileall", "-q", "-j1",
         "--invalidation-mode=unchecked-hash", f"/{folder}"],
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )  # fmt: skip


def _add_accounts(root: Path, accounts: tuple[Account, ...]) -> None:
    for a in accounts:
        shell = "/bin/bash" if a.login else "/usr/sbin/nologin"
        homes = ["--create-home"] if a.home.startswith("/home/") else ["--no-create-home"]
        command.run(
            ["chroot", root, "useradd", "--uid", str(a.uid), "--user-group", *homes,
             "--home-dir", a.home, "--shell", shell, a.name],
            env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH)},
        )  # fmt: skip
        if a.login:
            # sshd refuses a locked account ("!"); "*" is one without any password
            command.run(["chroot", root, "usermod", "--password", "*", a.name])


INIT = """\
#!/bin/busybox sh
# Load the one driver that the kernel lacks, mount the root, hand over.
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do /bin/busybox insmod "$module"; done
tries=0
until [ -b /dev/vda ]; do
  tries=$((tries + 1))
  if [ $tries -gt 100 ]; then echo "rave: no disk /dev/vda" >/dev/console; exit 1; fi
  /bin/busybox sleep 0.05
done
/bin/busybox mount -t ext4 -o rw,noatime /dev/vda /root || exit 1
exec /bin/busybox switch_root /root /usr/lib/systemd/systemd
"""
DRIVERS = ("virtio_blk",)


def _make_initrd(root: Path, work: Path, target: Path) -> None:
    for folder in ("bin", "dev", "modules", "root"):
        (work / folder).mkdir(parents=True)
    shutil.copy(root / "usr/bin/busybox", work / "bin/busybox")
    for number, driver in enumerate(DRIVERS):
        source = next(root.glob(f"usr/lib/modules/*/kernel/**/{driver}.ko*"))
        unpacked = work / "modules" / f"{number}-{driver}.ko"
        if source.suffix == ".xz":
            unpacked.write_bytes(lzma.decompress(source.read_bytes()))
        else:
            shutil.copy(source, unpacked)
    (work / "init").write_text(INIT)
    (work / "init").chmod(0o755)
    for path in [work, *work.rglob("*")]:
        os.utime(path, (EPOCH, EPOCH))
    names = sorted(str(p.relative_to(work)) for p in work.rglob("*"))
    command.run(
        ["cpio", "--create", "--format=newc", "--reproducible", "--quiet", "--owner=+0:+0",
         "--file", target],
        stdin="\n".join(names).encode(),
        cwd=work,
    )  # fmt: skip


# What a build leaves that belongs to that one build, or that only costs space.
FORGET = (
    "etc/ssh/ssh_host_*", "etc/ssl/private/ssl-cert-snakeoil.key",
    "etc/ssl/certs/ssl-cert-snakeoil.pem", "etc/machine-id", "etc/hostname", "etc/resolv.conf",
    "etc/apt/sources.list", "etc/apt/sources.list.d/*", "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-", "etc/subuid-", "etc/subgid-",
    "boot/*", "initrd.img*", "vmlinuz*",
    "usr/share/doc/*", "var/cache/apt/*", "var/cache/debconf/*-old", "var/cache/ldconfig/*",
    "var/lib/apt/lists/*", "var/lib/dbus/machine-id", "var/lib/systemd/random-seed",
    "var/lib/systemd/catalog/database", "var/lib/dpkg/*-old", "tmp/*", "run/*",
)  # fmt: skip


def _forget_the_build(root: Path) -> None:
    for pattern in FORGET:
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                files.remove_tree(path)
            else:
                path.unlink()
    # services expect their folders below /var/log, with their owners
    for path in (root / "var/log").rglob("*"):
        if not path.is_dir():
            path.unlink()
    (root / "var/log/journal").mkdir(mode=0o2755, exist_ok=True)
    # ucf asked debconf about a file whose name was a random one
    answers = root / "var/cache/debconf/config.dat"
    answers.write_text(re.sub(r"(= /tmp/[\w-]+)\.\w+$", r"\1", answers.read_text(), flags=re.M))


def make_filesystem(root: Path, raw: Path, disk_gb: int, name: str) -> None:
    """An ext4 image `raw` of `disk_gb` GiB (sparse) with the content of `root`.

    The same tree gives the same bytes: times are clamped, the UUID and the hash seed come from
    `name`. The root's own mkfs is used, because Debian 12's (1.47.0) is not reproducible.
    """
    _clamp_times(root)
    fs_uuid = uuid.uuid5(uuid.NAMESPACE_URL, f"rave:{name}")
    with raw.open("wb") as f:
        f.truncate(disk_gb * 2**30)
    libs = root / "usr/lib/x86_64-linux-gnu"
    command.run(
        [libs / "ld-linux-x86-64.so.2", "--library-path", libs, root / "usr/sbin/mke2fs",
         "-t", "ext4", "-q", "-F", "-L", "rave", "-m", "1", "-U", str(fs_uuid),
         "-E", f"hash_seed={fs_uuid},lazy_itable_init=1,nodiscard,root_owner=0:0",
         "-d", root, raw],
        env={"SOURCE_DATE_EPOCH": str(EPOCH), "MKE2FS_CONFIG": str(root / "etc/mke2fs.conf")},
    )  # fmt: skip


def _clamp_times(root: Path) -> None:
    # the time of access too: the first reading of an old file changes it (relatime)
    for folder, folders, names in os.walk(root, followlinks=False):
        for name in (*folders, *names, "."):
            path = os.path.join(folder, name)  # noqa: PTH118 - 40,000 of them: a second less
            state = os.lstat(path)
            changed = min(int(state.st_mtime), EPOCH)
            if (state.st_atime, state.st_mtime) != (changed, changed):
                os.utime(path, (changed, changed), follow_symlinks=False)


POLICY = "usr/lib/rave/apparmor.bin"


def compile_policy(root: Path) -> None:
    """Compile the machine's AppArmor profiles, by the root's own parser, to what its kernel takes.

    A machine under emulation would take seconds for it at each boot. The features are those that
    every kernel since 5.4 has, so that the result does not depend on this host's.
    """
    command.run(
        ["chroot", root, "/usr/sbin/apparmor_parser", "--skip-kernel-load", "--skip-cache",
         "--kernel-features=/etc/apparmor.d/abi/kernel-5.4-vanilla",
         "--policy-features=/etc/apparmor.d/abi/kernel-5.4-vanilla",
         f"--ofile=/{POLICY}", "/etc/apparmor.d/rave"],
    )  # fmt: skip
    if not (root / POLICY).stat().st_size:
        raise RavectlError("AppArmor's profiles were compiled to nothing", "report this defect")


def drop_setuid(root: Path, kept: tuple[str, ...]) -> None:
    """Take the rights of their owners (setuid, setgid) from all programs but those `kept`.

    `kept` are paths in the machine. A package that brings one more does not bring it in here.
    """
    spared = {str(root / path.lstrip("/")) for path in kept}
    for folder, _, names in os.walk(root, followlinks=False):
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 - 40,000 of them
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID) and path not in spared:
                Path(path).chmod(stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))


def close_cron(root: Path) -> None:
    """Close the folders of jobs to all but root. Packages bring them; no cron runs them here."""
    for folder in root.glob("etc/cron.*"):
        folder.chmod(0o700)


def copy_root(base: Path, target: Path) -> None:
    """Copy a base's root with owners, modes, links and capabilities."""
    command.run(["cp", "--archive", "--reflink=auto", base, target])
