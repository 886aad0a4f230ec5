"""A workspace: the folder that a person works in, and where ravectl keeps what is its own.

rave.yaml            the person's profile, if there is one
.rave/ca/            the certificate authority that the workspace's machines are signed by
.rave/ssh/           the operator's key
.rave/signing/       the key that the workspace's images are signed by
.rave/instances/N/   everything of the instance N
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path

from ravectl import files
from ravectl.errors import HostError, RavectlError, UsageError

PROFILE_FILE = "rave.yaml"
STATE_DIR = ".rave"
_FIRST_PROFILE = """\
# This workspace's machine: what is not written here is as in the profile that it extends.
# See what it comes to: ravectl plan
extends: safe
"""
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True)
class Workspace:
    """A workspace by its folder; nothing is made before `prepare`."""

    root: Path

    @property
    def state(self) -> Path:
        """The folder of everything that ravectl keeps for this workspace."""
        return self.root / STATE_DIR

    @property
    def profile_file(self) -> Path | None:
        """The workspace's own profile, None when it has none."""
        path = self.root / PROFILE_FILE
        # also what is no file, or a link to nothing: to build another machine is worse than to fail
        return path if os.path.lexists(path) else None

    @property
    def ca_dir(self) -> Path:
        """Where the certificate authority is kept."""
        return self.state / "ca"

    @property
    def ssh_dir(self) -> Path:
        """Where the operator's SSH key is kept."""
        return self.state / "ssh"

    @property
    def signing_dir(self) -> Path:
        """Where the key is kept that signs images."""
        return self.state / "signing"

    @property
    def identity_file(self) -> Path | None:
        """The age key file that `init --identity` was told; None for sops' own place.

        Raises RavectlError when what it was told cannot be read.
        """
        path = self.state / "identity"
        try:
            named = path.read_text().strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UnicodeDecodeError) as e:
            # another key than the one that was told would be taken, or made
            quoted = shlex.quote(str(path))
            raise RavectlError(
                f"cannot read {path}, which names the age key file: {files.why_not(e)}",
                f"write that name anew: rm -r {quoted}; echo KEYFILE >{quoted}",
            ) from None
        return self.root / named if named else None

    def remember_identity(self, file: Path) -> None:
        """Have `identity_file` tell this; one in the workspace moves with it."""
        inside = file.is_relative_to(self.root)
        named = file.relative_to(self.root) if inside else file
        files.write_atomic(self.state / "identity", f"{named}\n", files.PRIVATE_FILE)

    @property
    def instances_dir(self) -> Path:
        """Where each instance has its folder."""
        return self.state / "instances"

    def instance_dir(self, name: str) -> Path:
        """The folder of the instance `name`; raises UsageError when that is no valid name."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot be the name of an instance",
                "use 1 to 32 small letters, digits and hyphens, with no hyphen at either end",
            )
        return self.instances_dir / name

    def make_profile(self) -> bool:
        """Write a profile that changes nothing yet, if there is none; whether it did."""
        if self.profile_file is not None:
            return False
        files.write_atomic(self.root / PROFILE_FILE, _FIRST_PROFILE)
        return True

    def keep_from_git(self, path: Path) -> None:
        """Have git ignore a private file, if it lies in this workspace and outside of .rave."""
        inside = path.is_relative_to(self.root) and not path.is_relative_to(self.state)
        if not inside:
            return
        line = f"/{path.relative_to(self.root)}"
        ignore = self.root / ".gitignore"
        known = ignore.read_text() if ignore.exists() else ""
        if line not in known.splitlines():
            end = "" if known.endswith("\n") or not known else "\n"
            files.write_atomic(ignore, f"{known}{end}{line}\n")

    def prepare(self) -> Workspace:
        """Make the state folder, private and ignored by git.

        Raises HostError if that fails, or if there is one that ravectl did not make here: one
        that came with a repository may have anything written anywhere.
        """
        quoted = shlex.quote(str(self.state))
        there = os.path.lexists(self.state)
        if there and not self.state.is_dir():
            raise HostError(
                f"{self.state} is no folder, and ravectl keeps what is its own in one",
                f"move it away: mv {quoted} {quoted}.old",
            )
        if there and (owner := _other_owner(self.state)) is not None:
            raise HostError(
                f"{self.state} belongs to {owner}, so ravectl did not make it here for you",
                f"work as {owner}; or in a folder of your own: --workspace FOLDER; or if it is "
                f"yours: sudo chown -R {os.geteuid()} {shlex.quote(str(self.root))}",
            )
        if there and not files.is_private(self.state):
            raise HostError(
                f"{self.state} is not private to you, so ravectl did not make it here",
                f"if you know it: chmod 700 {quoted}; if it came with what you cloned, remove it",
            )
        files.make_private_dir(self.state)
        ignore = self.state / ".gitignore"
        if not ignore.exists():
            files.write_atomic(ignore, "*\n", files.PRIVATE_FILE)
        return self


def _other_owner(folder: Path) -> str | None:
    """The account that a folder belongs to, None when it is ours."""
    uid = folder.lstat().st_uid
    if uid == os.geteuid():
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"the account {uid}"


def find(start: Path | None = None, override: Path | None = None) -> Workspace:
    """The workspace of `override` if given, else the one that `start` lies in.

    That is the nearest folder, from `start` (default: the current folder) upwards, that holds
    rave.yaml or .rave/; without one it is `start` itself. Raises UsageError when `override`
    is no folder, RavectlError when the current folder is gone.
    """
    if override is not None:
        root = files.expand(override).absolute()
        _require_folder(root)
        return Workspace(root)
    here = (start or _current_folder()).absolute()
    for folder in (here, *here.parents):
        if _is_workspace(folder, here):
            return Workspace(folder)
    return Workspace(here)


def _require_folder(path: Path) -> None:
    quoted = shlex.quote(str(path))
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            raise UsageError(f"there is no folder {path}", f"make it: mkdir -p {quoted}") from None
        raise UsageError(f"{path} is a link to nothing", f"see it: ls -l {quoted}") from None
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise UsageError(f"{path} is a link in a circle", f"see it: ls -l {quoted}") from None
    raise UsageError(f"{path} is a file and no folder", "name a folder: --workspace FOLDER")


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise RavectlError(
            "the current folder has been deleted", "go to another one, as by: cd"
        ) from None


def _is_workspace(folder: Path, here: Path) -> bool:
    # what others left above (/tmp/rave.yaml) must not decide what we build and run as whom
    with contextlib.suppress(OSError):
        ours = {os.geteuid(), here.stat().st_uid}
        profile, state = folder / PROFILE_FILE, folder / STATE_DIR
        if (profile.is_symlink() or profile.is_file()) and profile.lstat().st_uid in ours:
            return True
        return state.is_dir() and state.stat().st_uid in ours
    return False
