"""What a person sees while ravectl works: steps with their time, notes, errors. All on stderr.

On a terminal steps are a live line (Rich); elsewhere (a log, CI) each is a plain line when it
ends. Results that a program may read go to stdout, which this module never touches.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ravectl.errors import RavectlError

QUIET_STEP_SECONDS = 10.0  # off a terminal a long step says that it is alive this often

_verbose = False
_depth = 0


def configure(*, verbose: bool) -> None:
    """Set the verbosity for this process."""
    global _verbose  # noqa: PLW0603
    _verbose = verbose


def is_verbose() -> bool:
    """Whether every step is to be said."""
    return _verbose


def is_terminal() -> bool:
    """Whether stderr shows live lines."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """A line worth knowing."""
    _line(text)


def warn(text: str) -> None:
    """A line that a person should act on."""
    _line(_coloured("warning: ", "33") + text)


def detail(text: str) -> None:
    """A line for those who asked for --verbose."""
    if _verbose:
        _line(text)


def error(problem: RavectlError) -> None:
    """The line of cause, the material below it, the line of remedy."""
    _line(_coloured("error: ", "1;31") + problem.message)
    for line in problem.details.splitlines():
        _line(f"  | {line}")
    if problem.hint:
        _line(_coloured("  fix: ", "1") + problem.hint)


@dataclass
class Step:
    """A step under way; `update` says what it is at."""

    title: str
    started: float = field(default_factory=time.monotonic)
    text: str = ""
    _on_update: Callable[[], None] = lambda: None

    def update(self, text: str) -> None:
        """Replace the line that tells what the step waits for."""
        self.text = text
        self._on_update()

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.started


@contextlib.contextmanager
def step(title: str) -> Iterator[Step]:
    """Show a step while it runs and its duration when it ends."""
    global _depth  # noqa: PLW0603
    current = Step(title)
    show = _live if is_terminal() and _depth == 0 else _plain
    _depth += 1
    try:
        with show(current):
            yield current
    except BaseException:
        _line(f"{_indent()}{_coloured('failed', '31')}  {title}  ({current.seconds:.1f} s)")
        raise
    else:
        _line(f"{_indent()}{_coloured('done', '32')}  {title}  ({current.seconds:.1f} s)")
    finally:
        _depth -= 1


@contextlib.contextmanager
def _live(current: Step) -> Iterator[None]:
    from rich.console import Console  # noqa: PLC0415 - 60 ms that --help need not pay
    from rich.live import Live  # noqa: PLC0415
    from rich.spinner import Spinner  # noqa: PLC0415

    spinner = Spinner("dots")

    def picture() -> Spinner:
        waiting = f": {current.text}" if current.text else ""
        spinner.update(text=f"{current.title}{waiting}  ({current.seconds:.0f} s)")
        return spinner

    with Live(
        console=Console(stderr=True), get_renderable=picture, refresh_per_second=8, transient=True
    ):
        yield


@contextlib.contextmanager
def _plain(current: Step) -> Iterator[None]:
    done = threading.Event()
    said = ""

    def beat() -> None:
        nonlocal said
        while not done.wait(QUIET_STEP_SECONDS):
            if current.text != said:
                said = current.text
                _line(f"{_indent()}...   {current.title}: {said}  ({current.seconds:.0f} s)")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _indent() -> str:
    return "  " * (_depth - 1)


def _line(text: str) -> None:
    # a closed stderr (a pager that quit) is no reason to stop the work
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _coloured(text: str, code: str) -> str:
    if not is_terminal() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"
