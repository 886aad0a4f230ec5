"""Whose turn it is: by priority, then fair between projects, and nobody waits for ever. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

AGING_MS = 600_000  # what waits this long counts as one priority more
AGED_MOST = 10  # from the lowest priority to above the highest: so long, at most, it is passed


@dataclass(frozen=True, slots=True)
class Waiting:
    """The task of a project and priority that has waited longest."""

    task_id: str
    project: str
    priority: int
    since_ms: int
    seq: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a project has had: tasks that run now, and when it last got a turn (a count)."""

    running: int = 0
    last_turn: int = 0


def choose(waiting: Iterable[Waiting], loads: Mapping[str, Load], now_ms: int) -> Waiting | None:
    """The task to run next, or None when nothing waits.

    Of the highest priority: the project with the fewest tasks running, then the one whose
    last turn is longest ago; of one project the oldest.
    """
    nothing = Load()

    def order(w: Waiting) -> tuple[int, int, int, int]:
        load = loads.get(w.project, nothing)
        return (-_effective(w, now_ms), load.running, load.last_turn, w.seq)

    return min(waiting, key=order, default=None)


def _effective(w: Waiting, now_ms: int) -> int:
    aged = max(now_ms - w.since_ms, 0) // AGING_MS
    return w.priority + min(aged, AGED_MOST)
