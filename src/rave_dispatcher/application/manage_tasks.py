"""ManageTasks: what clients of the API do with tasks and events."""

from __future__ import annotations

from collections.abc import Callable

from rave_dispatcher.application.errors import ConflictError
from rave_dispatcher.application.ports import (
    Chance,
    Clock,
    EventFilter,
    Page,
    Store,
    TaskFilter,
)
from rave_dispatcher.domain.events import Event, Trace
from rave_dispatcher.domain.ids import make_uuid
from rave_dispatcher.domain.tasks import AgentType, IllegalStepError, Task


class ManageTasks:
    """Submit, list, show, cancel and replay."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        chance: Chance,
        max_attempts: int,
        wake_rules: Callable[[], None],
        wake_workers: Callable[[], None],
    ) -> None:
        self._store, self._clock, self._chance = store, clock, chance
        self._max_attempts = max_attempts
        self._wake_rules, self._wake_workers = wake_rules, wake_workers

    async def submit(
        self, agent_type: AgentType, prompt: str, project: str, priority: int, trace: Trace
    ) -> Task:
        """A task that no event asked for."""
        now = self._clock.wall_ms()
        task = Task(
            task_id=make_uuid(now, self._chance.token(10)),
            agent_type=agent_type,
            prompt=prompt,
            created_ms=now,
            trace=trace,
            project=project,
            priority=priority,
            max_attempts=self._max_attempts,
            not_before_ms=self._clock.steady_ms(),
        )
        await self._store.add_task(task)
        self._wake_workers()
        return task

    async def show(self, task_id: str) -> Task:
        """One task."""
        return await self._store.task(task_id)

    async def list(self, which: TaskFilter, cursor: str | None, limit: int) -> Page[Task]:
        """Tasks, the newest first."""
        return await self._store.tasks(which, cursor, limit)

    async def cancel(self, task_id: str) -> Task:
        """End a task; a running one ends shortly after."""
        return await self._step(task_id, lambda t: t.cancel(self._clock.wall_ms()))

    async def replay(self, task_id: str) -> Task:
        """Try a failed task anew."""
        task = await self._step(task_id, lambda t: t.replay(self._clock.steady_ms()))
        self._wake_workers()
        return task

    async def _step(self, task_id: str, change: Callable[[Task], Task]) -> Task:
        try:
            return await self._store.step(task_id, change)
        except IllegalStepError as e:
            raise ConflictError(str(e)) from None

    async def logs(self, task_id: str, offset: int, limit: int) -> tuple[bytes, int]:
        """A piece of a task's output."""
        return await self._store.log(task_id, offset, limit)

    async def show_event(self, event_uuid: str) -> Event:
        """One event."""
        return await self._store.event(event_uuid)

    async def list_events(self, which: EventFilter, cursor: str | None, limit: int) -> Page[Event]:
        """Events, the newest first."""
        return await self._store.events(which, cursor, limit)

    async def replay_event(self, event_uuid: str) -> Event:
        """Have the rules see an event once more."""
        event = await self._store.replay_event(event_uuid)
        self._wake_rules()
        return event
