"""The one family of errors that a person sees: a line of cause and a line of remedy.

Everything that ravectl refuses or fails at is raised as a RavectlError and printed once, by
the CLI. Anything else that escapes is a defect of ravectl and is reported as such.
"""

from __future__ import annotations

import errno
import os
import shlex
from pathlib import Path

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CHECK = 3
EXIT_HOST = 4
EXIT_INTERRUPTED = 130


class RavectlError(Exception):
    """A step failed.

    `message` is one line of cause, `hint` one line of remedy. `details` is material worth
    reading below them (the tail of a log), already free of secrets.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "", *, details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class UsageError(RavectlError):
    """The person asked for something that does not exist or makes no sense."""

    exit_code = EXIT_USAGE


class ProfileError(UsageError):
    """A profile is wrong; the message names file, line and key."""


class HostError(RavectlError):
    """This host lacks something: a tool, memory, disk, a right."""

    exit_code = EXIT_HOST


def of_file(e: OSError) -> RavectlError | None:
    """What the system's no to a file means for a person; None when it is about no file."""
    if not isinstance(e.filename, (str, bytes)) or not e.filename:
        return None
    path = os.fsdecode(e.filename)
    if isinstance(e, FileNotFoundError) and Path(path).is_relative_to("/proc"):
        return None  # a process that ended: it was for us to expect
    # a line break in a name must not make two lines of one
    shown = path if path.isprintable() else repr(path)
    why = e.strerror or type(e).__name__
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = shlex.quote(str(Path(path).parent))
        return HostError(
            f"cannot write {shown}: {why}", f"make room and do it again: df -h {folder}"
        )
    return RavectlError(f"cannot use {shown}: {why}", f"ls -ld {shlex.quote(path)}")


class DeadlineError(RavectlError):
    """Something did not happen in time."""
