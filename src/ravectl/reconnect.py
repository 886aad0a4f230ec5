"""Stays with a machine: one connection, and another when it breaks or the machine restarts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from ravectl import lifecycle, ssh
from ravectl.errors import RavectlError
from ravectl.instance import Instance
from ravectl.model import InstanceState

FIRST_SECONDS = 1.0
MOST_SECONDS = 10.0  # a machine that is up again is noticed within this


@dataclass(frozen=True)
class Lost:
    """Why there is no connection, and in how many seconds the next attempt is made.

    `attempts` were made in vain since it was lost.
    """

    reason: str
    seconds: float
    attempts: int


class Backoff:
    """How long to wait before the next attempt: twice as long each time, within bounds."""

    def __init__(self) -> None:
        self._failures = 0

    def failed(self, reason: str) -> Lost:
        """What follows from one more failure."""
        wait = min(FIRST_SECONDS * 2.0 ** min(self._failures, 10), MOST_SECONDS)
        self._failures += 1
        return Lost(reason, wait, self._failures - 1)

    def worked(self) -> None:
        """Begin anew: something came through."""
        self._failures = 0


class _OutputError(Exception):
    """Where `work` writes to failed, not the connection."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def output() -> Iterator[None]:
    """For what `work` prints: its OSError (a reader went away, a full disk) ends `stay`."""
    try:
        yield
    except OSError as e:
        raise _OutputError(e) from e


def stay(
    instance: Instance,
    work: Callable[[ssh.Connection, Callable[[], None]], None],
    lost: Callable[[Lost], None],
) -> NoReturn:
    """Do `work` on a connection, again on a new one whenever that raises ConnectionError.

    `work` calls what it is given when something came through, which ends the backing off; it
    may return to be called once more. `lost` is told of each break and each vain attempt. Ends
    by what `work` raises else, such as RavectlError or within `output`, and by Ctrl-C.
    """
    backoff = Backoff()
    while True:
        try:
            state = instance.state()
            if state is not InstanceState.RUNNING:
                raise ConnectionError(f"the machine is {state.value}")
            with lifecycle.connect_again(instance) as connection:
                work(connection, backoff.worked)
        except _OutputError as e:
            raise e.error from None
        except OSError as e:
            why = backoff.failed(" ".join(str(e).split()) or type(e).__name__)
            lost(why)
            time.sleep(why.seconds)


def check_running(instance: Instance) -> None:
    """RavectlError unless the machine runs: what is watched should be there at the start."""
    state = instance.state()
    if state is not InstanceState.RUNNING:
        flag = "" if instance.name == "default" else f" --name {instance.name}"
        raise RavectlError(
            f"instance {instance.name!r} is {state.value}", f"start it: ravectl up{flag}"
        )
