"""Files as ravectl needs them: atomic, locked, private, and found wherever it is installed.

This is the lowest layer that touches the disk. It knows nothing of machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ravectl.errors import HostError, RavectlError

PRIVATE_FILE = 0o600
PRIVATE_DIR = 0o700


def find_data(name: str) -> Path:
    """What is shipped beside the code: "templates", "profiles", a lock file.

    An installed wheel carries them inside the package; a checkout has them at its top.
    Raises RavectlError when the installation is broken.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "data" / name, package.parents[1] / name):
        if candidate.exists():
            return candidate
    raise RavectlError(
        f"the installation of ravectl is incomplete: {name!r} is missing",
        "install ravectl again: pip install --force-reinstall ravectl",
    )


def package_source(package: str) -> dict[str, str]:
    """The files of a package that is shipped beside this one, by their path in it: modules, and
    the data (text) that they read.

    Raises RavectlError when the installation is broken.
    """
    folder = Path(__file__).resolve().parents[1] / package
    found = {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    if "__main__.py" not in found:
        raise RavectlError(
            f"the installation of ravectl is incomplete: its part {package!r} is missing",
            "install ravectl again: pip install --force-reinstall ravectl",
        )
    return found


def cache_dir() -> Path:
    """Where images and package roots are kept: they hold no secret and can be made again."""
    if override := os.environ.get("RAVECTL_CACHE_DIR"):
        return expand(override).absolute()
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ravectl"


def expand(path: str | Path) -> Path:
    """A path with ~ and ~user as the shell has them: ~nobody-by-that-name is a plain name.

    Raises HostError when ~ is meant and this account has no home.
    """
    found = Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for unknown users
    if found.parts[:1] == ("~",):
        raise HostError("this account has no home folder", "name one: export HOME=/some/folder")
    return found


def why_not(e: Exception) -> str:
    """Why a text file could not be read or written, for a message."""
    if isinstance(e, UnicodeDecodeError):
        return "it is not text"
    return (getattr(e, "strerror", None) or type(e).__name__).lower()


def fast_tmp(need_bytes: int) -> Path:
    """A folder for bulky intermediate files: memory-backed if that has three times the room.

    Raises HostError when no candidate has `need_bytes` of free space.
    """
    for path, factor in ((Path("/dev/shm"), 3), (Path(tempfile.gettempdir()), 1)):  # noqa: S108
        usable = path.is_dir() and os.access(path, os.W_OK)
        if usable and shutil.disk_usage(path).free >= factor * need_bytes:
            return path
    raise HostError(
        f"no temporary folder has {need_bytes // 2**20} MB free",
        "free some space in /tmp, or set TMPDIR to a folder on a larger disk",
    )


def private_tmp(need_bytes: int) -> Path:
    """A folder of ours alone for the same: in one for all, others could be there before us.

    Raises HostError as fast_tmp does, and when somebody else made it.
    """
    return _own_folder(fast_tmp(need_bytes))


def _own_folder(parent: Path) -> Path:
    folder = parent / f"ravectl-{os.geteuid()}"
    folder.mkdir(mode=PRIVATE_DIR, exist_ok=True)
    if not is_private(folder):
        raise HostError(f"{folder} was made by somebody else", f"look at it: ls -ld {folder}")
    return folder


def require_space(path: Path, need_bytes: int, purpose: str) -> None:
    """Raise HostError when the disk below `path` has less than `need_bytes` free."""
    probe = path
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < need_bytes:
        raise HostError(
            f"{purpose} needs {need_bytes // 2**20} MB on the disk of {probe}, "
            f"{free // 2**20} MB are free",
            "free some space (ravectl gc), or move the cache to a larger disk: "
            f"mv -T {shlex.quote(str(cache_dir()))} NEW && export RAVECTL_CACHE_DIR=NEW",
        )


def make_private_dir(path: Path) -> Path:
    """Make `path` (and its parents) with mode 0700 and return it."""
    try:
        path.mkdir(mode=PRIVATE_DIR, parents=True, exist_ok=True)
        path.chmod(PRIVATE_DIR)
    except OSError as e:
        raise _unwritable(path, e) from None
    return path


def make_dir(path: Path) -> Path:
    """Make `path` and its parents; raises HostError with the cause when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _unwritable(path, e) from None
    return path


def _unwritable(path: Path, e: OSError) -> HostError:
    return HostError(
        f"cannot write {path}: {(e.strerror or str(e)).lower()}",
        "check the folder's owner and free space, or choose another one (--workspace, "
        "RAVECTL_CACHE_DIR)",
    )


def write_atomic(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """Replace `path` by `data` in one step; a crash leaves the old file or the new, never half.

    The file has its final `mode` before it has content. Raises HostError when it cannot be.
    """
    raw = data.encode() if isinstance(data, str) else data
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as e:
        raise _unwritable(path, e) from None
    try:
        with os.fdopen(fd, "wb") as f:
            os.fchmod(f.fileno(), mode)
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        Path(name).replace(path)
    except OSError as e:
        Path(name).unlink(missing_ok=True)
        raise _unwritable(path, e) from None
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_out(path: Path, text: str) -> None:
    """Write what a person asked for to where he said: a file, or a device, pipe or link there.

    Raises HostError when it cannot be.
    """
    if not path.exists() or path.is_file():
        write_atomic(Path(os.path.realpath(path)), text)
        return
    try:
        path.write_text(text)  # replaced, it would be no device any more
    except OSError as e:
        raise _unwritable(path, e) from None


def write_json(path: Path, value: object, mode: int = 0o644) -> None:
    """Write `value` as readable JSON with sorted keys, atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n", mode)


def read_json(path: Path) -> Any:
    """Parse `path`; raises RavectlError naming the file when it is damaged."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as e:
        raise RavectlError(
            f"{path} cannot be read: {e}", f"remove it and run the command again: {path}"
        ) from None


def digest_bytes(data: bytes) -> str:
    """SHA-256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_value(value: object) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@contextlib.contextmanager
def lock(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` exclusively; it ends with the process, however that ends.

    `what` says what is locked, for the message. With `wait` it blocks (and says so on
    stderr), else RavectlError is raised while another process holds it.
    """
    # a link that somebody else put there would have us truncate what it names
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, PRIVATE_FILE)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            holder = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
            if not wait:
                raise RavectlError(
                    f"{what} is in use by another ravectl (process {holder})",
                    "wait for it to finish, or stop it, then run the command again",
                ) from None
            print(f"waiting for process {holder}, which uses {what}", file=sys.stderr)
            fcntl.flock(fd, fcntl.LOCK_EX)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A private folder that is on no disk, gone afterwards; HostError when there is none.

    What a killed process left there is removed by the next one.
    """
    try:
        parent = _own_folder(Path("/dev/shm"))  # noqa: S108 - a tmpfs
    except OSError:
        raise HostError(
            "this host has no /dev/shm that can be written", "mount a tmpfs there"
        ) from None
    with staging(parent, "memory") as made:
        yield made


def is_private(folder: Path) -> bool:
    """Whether a folder is ours, no link, and closed to all others."""
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return ours and not found.st_mode & 0o077


@contextlib.contextmanager
def staging(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder for work in progress, gone afterwards whatever happens.

    What a killed process left behind is removed by the next one: each folder has a lock file
    beside it that its maker holds, so that a folder whose lock is free has no maker any more.
    """
    make_dir(parent)
    _sweep(parent, prefix)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{prefix}."))
    lockfile = folder.with_name(folder.name + ".lock")
    try:
        with lock(lockfile, str(folder)):
            yield folder
    finally:
        remove_tree(folder)
        lockfile.unlink(missing_ok=True)


def _sweep(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}.*"):
        with contextlib.suppress(FileNotFoundError):  # its maker has ended meanwhile
            if folder.lstat().st_uid != os.geteuid():
                continue
        if folder.name.endswith(".lock"):
            if not folder.with_name(folder.name.removesuffix(".lock")).exists():
                folder.unlink(missing_ok=True)
            continue
        lockfile = folder.with_name(folder.name + ".lock")
        with contextlib.suppress(RavectlError), lock(lockfile, str(folder)):
            remove_tree(folder)
            lockfile.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Delete a tree, but never through a mount point; no error when it is not there.

    Raises RavectlError when something below it is still mounted.
    """
    mounted = [m for m in mount_points() if m == path or path in m.parents]
    if mounted:
        raise RavectlError(
            f"{path} still has {mounted[0]} mounted below it",
            f"unmount it: umount --recursive {mounted[0]}",
        )
    shutil.rmtree(path, ignore_errors=True)


def mount_points() -> list[Path]:
    """Every mount point of this process's namespace."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # mountinfo(5): blanks in a path are written as octal escapes
    return [Path(line.split()[4].encode().decode("unicode_escape")) for line in lines]


def filesystem_of(path: Path) -> str:
    """The type of the file system that an existing path lies on, as mountinfo(5) has it."""
    real = path.resolve()
    kind, best = "", -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words, _, rest = line.partition(" - ")
        point = Path(words.split()[4].encode().decode("unicode_escape"))
        # of two at one place the later one is seen
        if (point == real or point in real.parents) and len(point.parts) >= best:
            kind, best = rest.split()[0], len(point.parts)
    return kind


def is_there(path: Path) -> bool:
    """Whether something has this name, be it a link to nothing.

    OSError when nobody can say, which os.path.lexists takes for no.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size_of(path: Path) -> int:
    """The size of a file in bytes; 0 when it is not there, or not any more."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0
