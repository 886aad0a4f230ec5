"""ExecuteAgentTask: whose turn it is, the lease, the run, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from rave_dispatcher.application.errors import DispatcherError, NotFoundError
from rave_dispatcher.application.ports import (
    Chance,
    Clock,
    Job,
    Log,
    Observer,
    Ran,
    Runner,
    RunnerUnavailableError,
    Span,
    Store,
    Tracer,
)
from rave_dispatcher.domain.queue import Load, choose
from rave_dispatcher.domain.tasks import (
    Backoff,
    IllegalStepError,
    Outcome,
    Status,
    Task,
    Usage,
)

IDLE_SECONDS = 1.0  # between looks at the queue when nobody said that there is something
SWEEP_SECONDS = 5.0
UNAVAILABLE_SECONDS = 5.0  # before the next try when nothing can be run at all; doubled each time
UNAVAILABLE_MOST = 60.0
TRUNCATED = b"\n[the rest of the output was not kept]\n"


@dataclass(frozen=True)
class Execution:
    """How tasks are run."""

    concurrency: int = 1
    lease_ms: int = 30_000
    backoff: Backoff = Backoff()  # noqa: RUF009 - frozen
    max_output: int = 1_000_000


class ExecuteAgentTask:
    """Runs tasks, so many at once, until it is told to stop."""

    def __init__(
        self,
        store: Store,
        runner: Runner,
        clock: Clock,
        chance: Chance,
        tracer: Tracer,
        observer: Observer,
        log: Log,
        execution: Execution,
    ) -> None:
        self._store, self._runner = store, runner
        self._clock, self._chance = clock, chance
        self._tracer, self._observer, self._log = tracer, observer, log
        self._execution = execution
        self._wake = asyncio.Event()
        self._choosing = asyncio.Lock()
        self._loads: dict[str, Load] = {}
        self._turn = 0
        self._unavailable = 0  # tries since something could be run

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    async def recover(self) -> int:
        """Take back the tasks that a former process ran; how many there were.

        What waits for its next attempt waits on the former process's clock. It may have been
        ahead of ours, by years.
        """
        latest = self._clock.steady_ms() + self._execution.backoff.most_ms
        await self._store.hasten(latest)
        found = await self._store.running()
        for task in found:
            self._taken_back(
                await self._store.step(
                    task.task_id,
                    lambda t: t.recover(self._clock.steady_ms(), self._clock.wall_ms()),
                )
            )
        return len(found)

    def _taken_back(self, task: Task) -> None:
        """An attempt of which nobody knows how it went was counted."""
        outcome = (task.outcome or Outcome.LEASE_EXPIRED).value
        self._observer.task_ended(task.agent_type.value, outcome, None, task.trace.trace_id)
        if task.status is Status.PENDING:
            self._observer.task_retried(task.agent_type.value)
        self._log.warning(
            "a task was taken back",
            task_id=task.task_id, attempt=task.attempt, outcome=outcome,
            status=task.status.value, why=task.detail, trace_id=task.trace.trace_id,
        )  # fmt: skip

    async def run(self) -> None:
        """Work until cancelled; then end what runs and give its tasks back."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._execution.concurrency):
                group.create_task(self._worker())
            group.create_task(self._sweeper())

    async def _worker(self) -> None:
        while True:
            try:
                task = await self._lease_next()
            except DispatcherError as e:  # a full disk, say: what is queued stays there
                self._log.warning("no task can be leased", error=e.slug)
                task = None
            if task is None:
                await self._pause()
                continue
            await self._attempt(task)
            if self._unavailable:
                wait = UNAVAILABLE_SECONDS * 2 ** (self._unavailable - 1)
                await asyncio.sleep(min(wait, UNAVAILABLE_MOST))

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_SECONDS):
                await self._wake.wait()
        self._wake.clear()

    async def _lease_next(self) -> Task | None:
        async with self._choosing:  # two workers must not choose by the same loads
            now = self._clock.steady_ms()
            chosen = choose(await self._store.waiting(now), self._loads, now)
            if chosen is None:
                return None
            try:
                task = await self._lease(chosen.task_id, now)
            except (IllegalStepError, NotFoundError):  # cancelled meanwhile
                return None
            self._turn += 1
            self._count(task.project, 1)
            self._had_turn(task, now)
            return task

    async def _lease(self, task_id: str, now: int) -> Task:
        """Lease a task. One that is leased while this is cancelled is given back."""
        token = self._chance.token(16).hex()
        leasing = asyncio.ensure_future(
            self._store.step(task_id, lambda t: t.lease_to(token, now, self._execution.lease_ms))
        )
        try:
            return await asyncio.shield(leasing)
        except asyncio.CancelledError:
            with contextlib.suppress(IllegalStepError, DispatcherError):
                await self._release(await leasing, token)
            raise

    def _had_turn(self, task: Task, now: int) -> None:
        load = self._loads[task.project]
        served = tuple({**dict(load.served_ms), task.priority: now}.items())
        self._loads[task.project] = replace(load, last_turn=self._turn, served_ms=served)

    def _count(self, project: str, change: int) -> None:
        load = self._loads.get(project, Load())
        self._loads[project] = replace(load, running=load.running + change)
        if len(self._loads) > 1000:  # idle projects that had their turn long ago
            rows = sorted(self._loads.items(), key=lambda r: (-r[1].running, -r[1].last_turn))
            self._loads = dict(rows[:500])

    async def _attempt(self, task: Task) -> None:
        attributes = {
            "rave.task_id": task.task_id,
            "rave.agent_type": task.agent_type.value,
            "rave.attempt": task.attempt,
        }
        try:
            with self._tracer.span("task", task.trace, attributes) as span:
                await self._run(task, span)
        except DispatcherError as e:
            # its lease runs out, and then it is tried again
            self._log.error(
                "what became of a task could not be kept",
                task_id=task.task_id, error=e.slug, trace_id=task.trace.trace_id,
            )  # fmt: skip
        finally:
            self._count(task.project, -1)

    async def _run(self, task: Task, span: Span) -> None:
        assert task.lease is not None
        token = task.lease.token
        job = Job(
            task.task_id, task.attempt, task.agent_type, task.prompt, span.trace, task.rule
        )  # fmt: skip
        output = _Output(self._store, task, self._execution.max_output)
        began = self._clock.steady_ms()
        running = asyncio.create_task(self._runner.run(job, output.append))
        try:
            stopped = await self._keep_leased(task.task_id, token, running)
            ran = await self._result(running, began)
        except asyncio.CancelledError:
            await _end(running)
            await self._release(task, token)
            raise
        except RunnerUnavailableError as e:
            await self._release(task, token)
            self._cannot_run(task, span, str(e))
            return
        self._unavailable = 0
        if stopped is not Outcome.LEASE_EXPIRED:
            await self._finish(task, token, ran, span)

    async def _keep_leased(
        self, task_id: str, token: str, running: asyncio.Task[Ran]
    ) -> Outcome | None:
        """Renew the lease until the run ends; end the run when it was cancelled or lost."""
        interval = self._execution.lease_ms / 3000
        while True:
            done, _ = await asyncio.wait({running}, timeout=interval)
            if done:
                return None
            try:
                task = await self._store.step(
                    task_id,
                    lambda t: t.renew(token, self._clock.steady_ms(), self._execution.lease_ms),
                )
            except IllegalStepError:
                await _end(running)
                return Outcome.LEASE_EXPIRED
            except DispatcherError:  # a full disk: the lease may yet be renewed in time
                continue
            if task.cancel_requested:
                await _end(running)
                return Outcome.CANCELLED

    async def _result(self, running: asyncio.Task[Ran], began: int) -> Ran:
        spent = Usage(self._clock.steady_ms() - began, None, None)
        if running.cancelled():
            return Ran(Outcome.CANCELLED, "", spent)
        if (error := running.exception()) is not None:
            if isinstance(error, RunnerUnavailableError):
                raise error
            # only its kind: its text may quote a command line
            detail = f"the agent could not be run: {type(error).__name__}"
            return Ran(Outcome.NOT_STARTED, detail, spent)
        return running.result()

    def _cannot_run(self, task: Task, span: Span, why: str) -> None:
        self._unavailable = min(self._unavailable + 1, 10)
        span.fail(why)
        self._log.error(
            "no task can be run now; what is queued waits",
            task_id=task.task_id, error=why, trace_id=task.trace.trace_id,
        )  # fmt: skip

    async def _finish(self, task: Task, token: str, ran: Ran, span: Span) -> None:
        delay = self._execution.backoff.delay_ms(task.attempt, self._chance.fraction())

        def change(t: Task) -> Task:
            now, wall = self._clock.steady_ms(), self._clock.wall_ms()
            if ran.outcome is Outcome.SUCCEEDED:
                return t.succeed(token, ran.usage, now, wall)
            return t.fail(token, ran.outcome, ran.detail, ran.usage, now, wall, delay)

        try:
            ended = await self._store.step(task.task_id, change)
        except IllegalStepError:
            self._log.warning("a task's lease was lost at its end", task_id=task.task_id)
            return
        seconds = ran.usage.duration_ms / 1000
        self._observer.task_ended(
            task.agent_type.value, ran.outcome.value, seconds, task.trace.trace_id
        )
        span.set("rave.outcome", ran.outcome.value)
        if ended.status is Status.PENDING:
            self._observer.task_retried(task.agent_type.value)
        if ran.outcome is not Outcome.SUCCEEDED:
            span.fail(ran.detail or ran.outcome.value)
        self._log.info(
            "an attempt at a task ended",
            task_id=task.task_id, attempt=task.attempt, outcome=ran.outcome.value,
            status=ended.status.value, duration_ms=ran.usage.duration_ms,
            trace_id=task.trace.trace_id,
        )  # fmt: skip

    async def _release(self, task: Task, token: str) -> None:
        with contextlib.suppress(IllegalStepError, DispatcherError):
            await self._store.step(
                task.task_id,
                lambda t: t.release(token, self._clock.steady_ms(), self._clock.wall_ms()),
            )

    async def _sweeper(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            with contextlib.suppress(DispatcherError):
                await self.sweep()

    async def sweep(self) -> int:
        """Take back the tasks whose lease is over; how many there were."""
        swept = 0
        for task in await self._store.running():
            now = self._clock.steady_ms()
            if task.lease is None or task.lease.until_ms > now:
                continue
            with contextlib.suppress(IllegalStepError, NotFoundError):
                expiry = self._expiry(task.attempt, now)
                self._taken_back(await self._store.step(task.task_id, expiry))
                swept += 1
        return swept

    def _expiry(self, attempt: int, now: int) -> Callable[[Task], Task]:
        delay = self._execution.backoff.delay_ms(attempt, self._chance.fraction())
        return lambda t: t.expire(now, self._clock.wall_ms(), delay)


async def _end(running: asyncio.Task[Ran]) -> None:
    running.cancel()
    await asyncio.wait({running})


class _Output:
    """Keeps what an agent writes, up to a bound."""

    def __init__(self, store: Store, task: Task, most: int) -> None:
        self._store, self._task, self._left = store, task, most

    async def append(self, data: bytes) -> None:
        """Keep a piece; what is beyond the bound is dropped, and that is said once."""
        if self._left <= 0:
            return
        kept = data[: self._left]
        self._left -= len(data)
        if self._left <= 0:
            kept += TRUNCATED
        # output is worth less than the task: a full disk must not end an agent's work
        with contextlib.suppress(DispatcherError):
            await self._store.append_log(self._task.task_id, self._task.attempt, kept)
