"""Whose turn it is: by priority, then fair between projects, and nobody waits for ever. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

AGING_MS = 600_000  # a project that waits this long with a priority counts as one more
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
    served_ms: tuple[tuple[int, int], ...] = ()  # by priority: when a task of it had a turn

    def waiting_since(self, w: Waiting) -> int:
        """From when the project has waited with tasks of this priority.

        Not from when the task came: a project that is served has not waited, however many
        tasks it brought, or what it brought at once would all go before what others bring later.
        """
        return max(w.since_ms, dict(self.served_ms).get(w.priority, w.since_ms))


def choose(waiting: Iterable[Waiting], loads: Mapping[str, Load], now_ms: int) -> Waiting | None:
    """The task to run next, or None when nothing waits.

    Of the highest priority: the project with the fewest tasks running, then the one whose
    last turn is longest ago; of one project the oldest.
    """
    nothing = Load()

    def order(w: Waiting) -> tuple[int, int, int, int]:
        load = loads.get(w.project, nothing)
        return (-_effective(w, load, now_ms), load.running, load.last_turn, w.seq)

    return min(waiting, key=order, default=None)


def _effective(w: Waiting, load: Load, now_ms: int) -> int:
    aged = max(now_ms - load.waiting_since(w), 0) // AGING_MS
    return w.priority + min(aged, AGED_MOST)
