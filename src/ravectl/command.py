"""The only module that starts processes.

`run` is for commands that end, `spawn` for those that stay. A command is a list; secrets
travel by `stdin` or a file, never in it. What a failed command printed is quoted in the error
once, with everything in `redact` blanked.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ravectl import console
from ravectl.errors import DeadlineError, HostError, RavectlError

TAIL_LINES = 15
MAX_TOLD = 2000  # characters of a command
_URL_LOGIN = re.compile(r"://[^/@\s]+@")  # a mirror's or a binary cache's may hold a password
GRACE_SECONDS = 3.0  # between TERM and KILL; as long as clan-core waits

Argv = Sequence[str | os.PathLike[str]]
Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Result:
    """What a finished command left: its streams as text, its exit code, its duration."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    seconds: float


def find_tool(name: str, hint: str = "") -> str:
    """The path of an executable; raises HostError with `hint` when it is not on PATH."""
    # /usr/sbin holds mkfs.ext4 and nft, and is not on an ordinary user's PATH in Debian
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    if found := shutil.which(name, path=path):
        return found
    raise HostError(f"{name} is not installed on this host", hint or "run: ravectl doctor")


def run(
    argv: Argv,
    *,
    stdin: bytes = b"",
    timeout: float = 600.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    hint: str = "",
    redact: Sequence[str] = (),
    on_line: Callable[[str], None] | None = None,
    on_quiet: Callable[[], None] | None = None,
    pass_fds: Sequence[int] = (),
    keep_lines: int | None = None,
) -> Result:
    """Run a command to its end and return what it printed.

    `timeout` is in seconds. `on_line` receives each line of stderr as it comes; `on_quiet` is
    called after each second without one. Either may raise, which ends the command. Of stderr
    the last `keep_lines` are returned, all by default. The command
    gets a session of its own and dies with this process, even by SIGKILL (PR_SET_PDEATHSIG).
    Raises HostError when the program is missing, RavectlError when it fails and `check` is
    set, DeadlineError when it takes too long; Ctrl-C ends the command before it goes up.
    """
    words = tuple(os.fspath(a) for a in argv)
    process = _start(words, env=env, cwd=cwd, pass_fds=pass_fds, redact=redact)
    result = _finish(process, words, stdin, timeout, hint, redact, on_line, on_quiet, keep_lines)
    if check and result.returncode != 0:
        raise failure(result, hint, redact)
    return result


class Background:
    """A command that runs while its maker does something else; made by `background`."""

    def __init__(self, words: tuple[str, ...], process: Process, timeout: float, hint: str) -> None:
        self._process = process
        self._hint = hint
        self._outcome: Result | BaseException | None = None
        self._thread = threading.Thread(target=self._watch, args=(words, timeout), daemon=True)
        self._thread.start()

    def _watch(self, words: tuple[str, ...], timeout: float) -> None:
        try:
            self._outcome = _finish(self._process, words, b"", timeout, self._hint, (), None)
        except RavectlError as e:
            self._outcome = e

    def result(self) -> Result:
        """Wait for its end; raises as `run` does."""
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        if self._outcome.returncode != 0:
            raise failure(self._outcome, self._hint)
        return self._outcome

    def end(self) -> None:
        """End the command if it still runs."""
        if self._process.poll() is None:
            kill_group(self._process)
        self._thread.join(timeout=GRACE_SECONDS)


@contextlib.contextmanager
def background(
    argv: Argv,
    *,
    timeout: float = 600.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    hint: str = "",
) -> Iterator[Background]:
    """Run a command beside the block; it does not outlive the block."""
    words = tuple(os.fspath(a) for a in argv)
    running = Background(words, _start(words, env=env, cwd=cwd, pass_fds=()), timeout, hint)
    try:
        yield running
    finally:
        running.end()


def _finish(
    process: Process,
    words: tuple[str, ...],
    stdin: bytes,
    timeout: float,
    hint: str,
    redact: Sequence[str],
    on_line: Callable[[str], None] | None,
    on_quiet: Callable[[], None] | None = None,
    keep_lines: int | None = None,
) -> Result:
    """Feed a started command, gather what it prints, and wait for its end."""
    started = time.monotonic()
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    out: list[bytes] = []
    threads = [
        threading.Thread(target=_feed, args=(process, stdin), daemon=True),
        threading.Thread(target=_drain, args=(process.stdout, out), daemon=True),
        threading.Thread(target=_split, args=(process.stderr, lines), daemon=True),
    ]
    for t in threads:
        t.start()
    err: collections.deque[str] = collections.deque(maxlen=keep_lines)
    try:
        while True:
            left = started + timeout - time.monotonic()
            try:
                line = lines.get(timeout=max(min(left, 1.0) if on_quiet else left, 0.01))
            except queue.Empty:
                if on_quiet and time.monotonic() < started + timeout:
                    on_quiet()
                    continue
                raise DeadlineError(
                    f"{words[0]} did not finish within {timeout:.0f} s",
                    hint or "run the command again; with --verbose it shows every step",
                    details=_tail("\n".join(err), redact),
                ) from None
            if line is None:
                break
            err.append(line)
            if on_line:
                on_line(line)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(started + timeout - time.monotonic(), 0.01))
    except BaseException:
        kill_group(process)
        raise
    if process.poll() is None:
        kill_group(process)
        raise DeadlineError(f"{words[0]} did not finish within {timeout:.0f} s", hint)
    for t in threads:
        t.join(timeout=GRACE_SECONDS)
    return Result(
        words,
        process.returncode,
        b"".join(out).decode(errors="replace"),
        "\n".join(err),
        time.monotonic() - started,
    )


def failure(result: Result, hint: str = "", redact: Sequence[str] = ()) -> RavectlError:
    """The error that tells of a failed command, with the end of what it printed."""
    code = result.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit {code})"
    text = result.stderr.strip() or result.stdout.strip()
    return RavectlError(
        f"{Path(result.argv[0]).name} {how}",
        hint or f"the command was: {_blank(shlex.join(result.argv), redact)}",
        details=_tail(text, redact),
    )


def spawn(
    argv: Argv,
    *,
    log: Path | None = None,
    stdin: int | None = None,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
) -> Process:
    """Start a command that outlives this process, in a session of its own.

    Its output is appended to `log` (mode 0600) or dropped.
    """
    words = [os.fspath(a) for a in argv]
    _tell(words)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    sink = os.open(log, flags, 0o600) if log else os.open(os.devnull, os.O_WRONLY)
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            pass_fds=pass_fds,
            env=None if env is None else dict(env),
        )
    except FileNotFoundError:
        raise HostError(
            f"{words[0]} is not installed on this host", "run: ravectl doctor"
        ) from None
    finally:
        os.close(sink)


def interactive(argv: Argv, hint: str) -> int:
    """Run a command on the person's own terminal and return its exit code (an editor).

    Raises HostError with `hint` when it is not installed.
    """
    words = [os.fspath(a) for a in argv]
    return subprocess.run([find_tool(words[0], hint), *words[1:]], check=False).returncode


def isolated(argv: Argv) -> list[str | os.PathLike[str]]:
    """`argv` in a mount and process namespace of its own (root only).

    Whatever it mounts or leaves running disappears with it, also when it is killed.
    """
    return [
        find_tool("unshare"), "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "--",
        find_tool(os.fspath(argv[0])), *argv[1:],
    ]  # fmt: skip


def kill_group(process: Process) -> None:
    """End a command started by us and its children: TERM, a pause, KILL."""
    for sig, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait)
            return


def wait_quietly(process: Process, seconds: float) -> None:
    """Wait up to `seconds` for a spawned command to end, so that it leaves no zombie."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)


def _start(
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: Path | None,
    pass_fds: Sequence[int],
    redact: Sequence[str] = (),
) -> Process:
    _tell(words, redact)
    # setpriv(1) execs, so it costs no process; it asks the kernel to end the command when
    # we end. KILL, because unshare(1) blocks TERM while its child runs.
    prefix = [find_tool("setpriv"), "--pdeathsig", "KILL", "--"]
    program = find_tool(words[0])
    return subprocess.Popen(
        [*prefix, program, *words[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=None if env is None else dict(env),
        cwd=cwd,
        start_new_session=True,
        pass_fds=pass_fds,
    )


def _tell(words: Sequence[str], redact: Sequence[str] = ()) -> None:
    """Say a command to those who asked for --verbose, in one line."""
    text = _blank(shlex.join(words), redact).replace("\n", "\\n")
    text = _URL_LOGIN.sub("://[redacted]@", text)
    console.detail(f"run: {text[:MAX_TOLD]}")


def _feed(process: Process, data: bytes) -> None:
    assert process.stdin is not None
    # a command may end without reading all its input; its exit code says whether that is bad
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(data)


def _drain(stream: IO[bytes] | None, into: list[bytes]) -> None:
    assert stream is not None
    with stream:
        for chunk in iter(lambda: stream.read(65536), b""):
            into.append(chunk)


def _split(stream: IO[bytes] | None, into: queue.SimpleQueue[str | None]) -> None:
    assert stream is not None
    with stream:
        for line in stream:
            into.put(line.decode(errors="replace").rstrip("\r\n"))
    into.put(None)


def _blank(text: str, redact: Sequence[str]) -> str:
    for word in redact:
        if word:
            text = text.replace(word, "[redacted]")
    return text


def _tail(text: str, redact: Sequence[str]) -> str:
    return _blank("\n".join(text.splitlines()[-TAIL_LINES:]), redact)
