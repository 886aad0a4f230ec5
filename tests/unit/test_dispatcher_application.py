"""The use cases, on a real store in a file. Time, and where a test says so the agent, are fakes."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rave_dispatcher.adapters.clock import SystemChance
from rave_dispatcher.adapters.logs import JsonLog
from rave_dispatcher.adapters.prometheus import Metrics
from rave_dispatcher.adapters.signatures import Signatures
from rave_dispatcher.adapters.store.sqlite import EventStore
from rave_dispatcher.adapters.tracing import OtelTracer, make_provider
from rave_dispatcher.application import execute_agent_task
from rave_dispatcher.application.collect_metrics import CollectMetrics
from rave_dispatcher.application.errors import (
    ConflictError,
    InvalidError,
    MalformedError,
    NotFoundError,
    StorageFullError,
    UnauthenticatedError,
)
from rave_dispatcher.application.execute_agent_task import (
    TRUNCATED,
    ExecuteAgentTask,
    Execution,
)
from rave_dispatcher.application.manage_tasks import ManageTasks
from rave_dispatcher.application.ports import (
    EventFilter,
    Job,
    Ran,
    RunnerUnavailableError,
    TaskFilter,
    Verified,
)
from rave_dispatcher.application.process_webhook import Policy, ProcessWebhook, parse
from rave_dispatcher.config import Source
from rave_dispatcher.domain.events import Trace
from rave_dispatcher.domain.metrics import MAX_SERIES, Metric
from rave_dispatcher.domain.rules import Condition, Rule
from rave_dispatcher.domain.tasks import AgentType, Backoff, Outcome, Status, Task, Usage
from tests.dispatcher import github

TRACE = Trace("a" * 32, "b" * 16)
SECRET = b"s"
MINUTE = 60_000


class FakeClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.wall, self.steady = 1_700_000_000_000, 1_700_000_000_000

    def wall_ms(self) -> int:
        return self.wall

    def steady_ms(self) -> int:
        return self.steady

    def advance(self, ms: int) -> None:
        self.wall += ms
        self.steady += ms


Script = Callable[[Job, Callable[[bytes], Awaitable[None]]], Awaitable[Ran]]


@dataclass
class FakeRunner:
    """An agent that does what the test says, and remembers which jobs there were."""

    script: Script
    jobs: list[Job] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)

    async def run(self, job: Job, on_output: Callable[[bytes], Awaitable[None]]) -> Ran:
        self.jobs.append(job)
        try:
            return await self.script(job, on_output)
        except asyncio.CancelledError:
            self.ended["cancelled"] += 1
            raise


async def succeed(job: Job, on_output: Callable[[bytes], Awaitable[None]]) -> Ran:
    await on_output(job.prompt.encode())
    return Ran(Outcome.SUCCEEDED, "", Usage(5, 1.5, 50.0))


async def fail(job: Job, on_output: Callable[[bytes], Awaitable[None]]) -> Ran:
    return Ran(Outcome.ERROR, "exit code 3", Usage(5, None, None))


async def hang(job: Job, on_output: Callable[[bytes], Awaitable[None]]) -> Ran:
    await asyncio.sleep(3600)
    raise AssertionError


@dataclass
class World:
    """All use cases on one store."""

    store: EventStore
    clock: FakeClock
    runner: FakeRunner
    metrics: Metrics
    webhooks: ProcessWebhook
    executor: ExecuteAgentTask
    tasks: ManageTasks
    collect: CollectMetrics

    def receive(self, body: bytes, delivery: str | None = None, **more: Any) -> Any:
        return self.webhooks.receive(
            "github", lower(github(body, delivery, SECRET, **more)), body, TRACE
        )

    async def work(self, until: Callable[[], Awaitable[bool]], seconds: float = 10) -> None:
        """Let the executor run until something is so."""
        running = asyncio.create_task(self.executor.run())
        try:
            async with asyncio.timeout(seconds):
                while not await until():
                    await asyncio.sleep(0.01)
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def status(self, task_id: str) -> Status:
        return (await self.store.task(task_id)).status

    async def is_final(self, task_id: str) -> bool:
        return (await self.status(task_id)).is_final

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"rave_dispatcher_{name}", labels) or 0.0


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {k.lower(): v for k, v in headers.items()}


RULE = Rule("r", AgentType.BACKEND_ARCHITECT, "do {{ $.what }}", types=("issue*",))


def play(
    tmp_path: Path,
    story: Callable[[World], Coroutine[Any, Any, None]],
    *,
    script: Script = succeed,
    rules: tuple[Rule, ...] = (RULE,),
    execution: Execution | None = None,
) -> None:
    """Run a story in a world of its own."""

    async def run() -> None:
        store = await EventStore.open(tmp_path / "events.db", 0)
        provider = make_provider(store.post_spans, None)
        clock, chance, tracer = FakeClock(), SystemChance(), OtelTracer(provider)
        metrics, log, runner = Metrics(), JsonLog(), FakeRunner(script)
        chosen = execution or Execution(backoff=Backoff(1, 1.0, 1))
        executor = ExecuteAgentTask(store, runner, clock, chance, tracer, metrics, log, chosen)
        signatures = Signatures(
            {"github": Source(scheme="github", secret="x")}, lambda _: (SECRET,), lambda: 0.0
        )
        webhooks = ProcessWebhook(
            store, signatures, clock, chance, tracer, metrics, log, Policy(rules)
        )
        tasks = ManageTasks(store, clock, chance, 3, lambda: None, executor.wake)
        collect = CollectMetrics(store, clock, metrics)
        world = World(store, clock, runner, metrics, webhooks, executor, tasks, collect)
        try:
            await story(world)
        finally:
            provider.shutdown()
            await store.close()

    asyncio.run(run())


# --- webhooks --------------------------------------------------------------------------------


def test_an_event_becomes_a_task_once(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        body = b'{"what": "it", "repository": {"full_name": "o/r"}}'
        first = await w.receive(body, "d1", event="issues")
        again = await w.receive(body, "d1", event="issues")
        assert (first.duplicate, again.duplicate) == (False, True)
        assert (first.event_uuid, first.trace_id) == (again.event_uuid, again.trace_id)
        assert await w.webhooks.process() == 1
        assert await w.webhooks.process() == 0
        event = await w.store.event(first.event_uuid)
        assert event.processed
        task = await w.store.task(str(event.task_id))
        assert (task.prompt, task.project, task.event_uuid) == ("do it", "o/r", event.event_uuid)
        assert task.trace.trace_id == event.trace.trace_id
        assert w.counted("events_received_total", source="github") == 2
        assert w.counted("events_duplicate_total", source="github") == 1

    play(tmp_path, story)


def test_an_event_without_a_rule_is_kept_and_becomes_nothing(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        receipt = await w.receive(b"{}", "d", event="push")
        assert await w.webhooks.process() == 1
        event = await w.store.event(receipt.event_uuid)
        assert (event.processed, event.task_id, event.payload) == (True, None, b"{}")

    play(tmp_path, story)


def test_conditions_decide_after_types(tmp_path: Path) -> None:
    condition = Condition("$.n", equals=2, has_equals=True)
    rule = Rule(
        "r", AgentType.AI_ENGINEER, "p", conditions=(condition,), max_attempts=7, priority=9
    )

    async def story(w: World) -> None:
        for n in (1, 2):
            await w.receive(b'{"n": %d}' % n)
        assert await w.webhooks.process() == 2
        (task,) = (await w.store.tasks(TaskFilter(), None, 10)).items
        assert (task.max_attempts, task.priority) == (7, 9)

    play(tmp_path, story, rules=(rule,))


def test_a_rule_that_fails_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(self: Rule, payload: Any) -> str:
        if payload["what"] == "bad":
            raise RecursionError
        return "fine"

    monkeypatch.setattr(Rule, "render", render)

    async def story(w: World) -> None:
        for what in ("bad", "good"):
            await w.receive(json.dumps({"what": what}).encode(), event="issues")
        assert await w.webhooks.process() == 2
        (task,) = (await w.store.tasks(TaskFilter(), None, 10)).items
        assert task.prompt == "fine"

    play(tmp_path, story)


def test_refused_deliveries_store_nothing_and_are_counted(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        wrong = lower(github(b"{}", "d", b"other"))
        with pytest.raises(UnauthenticatedError):
            await w.webhooks.receive("github", wrong, b"{}", TRACE)
        with pytest.raises(NotFoundError):
            await w.webhooks.receive("nobody", wrong, b"{}", TRACE)
        for body in (b"no", b'"text"', b"[" * 200, b"[" * 100 + b"]" * 100, b'{"a": NaN}', b"\xff"):
            with pytest.raises(MalformedError):
                await w.receive(body)
        with pytest.raises(MalformedError, match="id of 1 to"):
            await w.receive(b"{}", "x" * 201)
        with pytest.raises(MalformedError, match="type of 1 to"):
            await w.webhooks.accept("x", Verified("id", None, ""), b'{"type": 7}', TRACE)
        assert (await w.store.events(EventFilter(), None, 10)).items == []
        count = w.counted
        assert count("webhooks_refused_total", source="github", reason="signature") == 1
        assert count("webhooks_refused_total", source="unknown", reason="not-found") == 1
        assert count("webhooks_refused_total", source="github", reason="malformed") == 7

    play(tmp_path, story)


def test_the_reason_for_bad_json_quotes_nothing() -> None:
    with pytest.raises(MalformedError) as e:
        parse(b'{"password": hunter2}', 10)
    assert "hunter2" not in e.value.detail


def test_a_payload_says_its_type_when_the_headers_do_not(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        receipt = await w.webhooks.accept("s", Verified("i", None, "v1"), b'{"type":"a.b"}', TRACE)
        assert (await w.store.event(receipt.event_uuid)).event_type == "a.b"

    play(tmp_path, story)


def test_an_event_that_is_replayed_becomes_another_task(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        receipt = await w.receive(b'{"what": 1}', event="issues")
        await w.webhooks.process()
        first = (await w.store.event(receipt.event_uuid)).task_id
        replayed = await w.tasks.replay_event(receipt.event_uuid)
        assert (replayed.processed, replayed.task_id) == (False, None)
        w.clock.advance(100 * MINUTE)
        await w.webhooks.process()
        assert w.counted("event_processing_seconds_sum") < 1, "it was processed in time"
        second = (await w.tasks.show_event(receipt.event_uuid)).task_id
        assert second not in (None, first)
        assert len((await w.tasks.list(TaskFilter(), None, 10)).items) == 2

    play(tmp_path, story)


# --- tasks -----------------------------------------------------------------------------------


async def submit(w: World, project: str = "-", priority: int = 5) -> Task:
    return await w.tasks.submit(AgentType.AI_ENGINEER, "prompt", project, priority, TRACE)


def test_a_task_runs_and_its_figures_and_output_are_kept(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        task = await submit(w)
        await w.work(lambda: w.is_final(task.task_id))
        done = await w.tasks.show(task.task_id)
        assert (done.status, done.outcome) == (Status.COMPLETED, Outcome.SUCCEEDED)
        assert done.usage == Usage(5, 1.5, 50.0)
        assert await w.tasks.logs(task.task_id, 0, 100) == (b"prompt", 6)
        assert await w.tasks.logs(task.task_id, 2, 2) == (b"om", 6)
        assert w.runner.jobs[0].trace.trace_id == TRACE.trace_id

    play(tmp_path, story)


def test_a_failing_task_is_retried_and_then_a_dead_letter(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        task = await submit(w)

        async def is_final() -> bool:
            w.clock.advance(1000)
            return await w.is_final(task.task_id)

        await w.work(is_final)
        dead = await w.tasks.show(task.task_id)
        assert (dead.status, dead.outcome, dead.attempt) == (Status.FAILED, Outcome.ERROR, 3)
        assert dead.detail == "exit code 3"
        assert len(w.runner.jobs) == 3
        assert w.counted("task_retries_total", agent_type="ai-engineer") == 2
        replayed = await w.tasks.replay(task.task_id)
        assert (replayed.status, replayed.attempt) == (Status.PENDING, 0)
        w.runner.script = succeed
        await w.work(is_final)
        assert (await w.tasks.show(task.task_id)).status is Status.COMPLETED
        with pytest.raises(ConflictError):
            await w.tasks.replay(task.task_id)

    play(tmp_path, story, script=fail)


def test_a_retry_waits(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        task = await submit(w)

        async def failed_once() -> bool:
            found = await w.store.task(task.task_id)
            return bool(w.runner.jobs) and found.status is Status.PENDING

        await w.work(failed_once)
        found = await w.store.task(task.task_id)
        assert found.not_before_ms >= w.clock.steady + MINUTE // 2
        assert await w.store.waiting(w.clock.steady) == []
        assert len(await w.store.waiting(w.clock.steady + MINUTE)) == 1

    play(tmp_path, story, script=fail, execution=Execution(backoff=Backoff(MINUTE, 2, MINUTE)))


def test_what_raises_is_a_failed_attempt_and_its_text_is_not_kept(tmp_path: Path) -> None:
    async def boom(job: Job, _: Any) -> Ran:
        raise RuntimeError("a secret")

    async def story(w: World) -> None:
        task = await submit(w)

        async def is_final() -> bool:
            w.clock.advance(1000)
            return await w.is_final(task.task_id)

        await w.work(is_final)
        dead = await w.tasks.show(task.task_id)
        assert dead.outcome is Outcome.NOT_STARTED
        assert dead.detail == "the agent could not be run: RuntimeError"

    play(tmp_path, story, script=boom)


def test_so_many_at_once_and_fair_between_projects(tmp_path: Path) -> None:
    at_once = [0, 0]

    async def slow(job: Job, _: Any) -> Ran:
        at_once[0] += 1
        at_once[1] = max(at_once)
        await asyncio.sleep(0.02)
        at_once[0] -= 1
        return Ran(Outcome.SUCCEEDED, "", Usage(20, None, None))

    async def story(w: World) -> None:
        flood = [await submit(w, "flood") for _ in range(8)]
        small = [await submit(w, "small") for _ in range(2)]
        await w.work(lambda: all_final(w, [*flood, *small]))
        order = [j.task_id for j in w.runner.jobs]
        # not behind the eight that came first
        assert max(order.index(t.task_id) for t in small) <= 4
        assert at_once[1] == 2

    play(tmp_path, story, script=slow, execution=Execution(concurrency=2))


async def all_final(w: World, tasks: list[Task]) -> bool:
    return all([await w.is_final(t.task_id) for t in tasks])


def test_priority(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        tasks = [await submit(w, priority=p) for p in (1, 9, 5)]
        await w.work(lambda: all_final(w, tasks))
        assert [j.task_id for j in w.runner.jobs] == [tasks[i].task_id for i in (1, 2, 0)]

    play(tmp_path, story)


def test_cancel_ends_a_running_task(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        task = await submit(w)
        later = await submit(w)
        assert (await w.tasks.cancel(later.task_id)).outcome is Outcome.CANCELLED

        asked = False

        async def cancelled() -> bool:
            nonlocal asked
            if w.runner.jobs and not asked:  # once: a second one may come after the end
                asked = True
                assert (await w.tasks.cancel(task.task_id)).cancel_requested
            return await w.is_final(task.task_id)

        await w.work(cancelled)
        done = await w.store.task(task.task_id)
        assert (done.status, done.outcome) == (Status.FAILED, Outcome.CANCELLED)
        assert w.runner.ended["cancelled"] == 1
        assert [j.task_id for j in w.runner.jobs] == [task.task_id]
        with pytest.raises(ConflictError):
            await w.tasks.cancel(task.task_id)

    play(tmp_path, story, script=hang, execution=Execution(lease_ms=60))


def test_stopping_gives_tasks_back_and_the_attempt_does_not_count(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        task = await submit(w)

        async def runs() -> bool:
            return bool(w.runner.jobs)

        await w.work(runs)
        back = await w.store.task(task.task_id)
        assert (back.status, back.attempt, back.lease) == (Status.PENDING, 0, None)
        assert w.runner.ended["cancelled"] == 1

    play(tmp_path, story, script=hang)


def test_a_lease_that_is_lost_ends_the_run_and_changes_nothing(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        task = await submit(w)

        async def lost() -> bool:
            if w.runner.jobs and w.runner.ended["cancelled"] == 0:
                w.clock.advance(100)  # all of the lease, between two renewals
            return w.runner.ended["cancelled"] == 1

        await w.work(lost)
        assert await w.status(task.task_id) is Status.RUNNING
        w.clock.advance(100)
        assert await w.executor.sweep() == 1
        assert await w.executor.sweep() == 0
        swept = await w.store.task(task.task_id)
        assert (swept.status, swept.outcome) == (Status.PENDING, Outcome.LEASE_EXPIRED)
        lost = {"agent_type": "ai-engineer", "outcome": "lease-expired"}
        assert w.counted("task_attempts_total", **lost) == 1

    play(tmp_path, story, script=hang, execution=Execution(lease_ms=90))


def test_a_clock_that_jumps_neither_loses_nor_doubles_a_lease(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        task = await submit(w)
        runs = 0

        async def done() -> bool:
            nonlocal runs
            runs += 1
            # an hour ahead, an hour back, a year back: of the wall, as NTP or a person sets it
            w.clock.wall += (3_600_000, -3_600_000, -31_536_000_000)[runs % 3]
            await w.executor.sweep()
            return await w.is_final(task.task_id)

        await w.work(done)
        assert len(w.runner.jobs) == 1
        ended = await w.store.task(task.task_id)
        assert ended.status is Status.COMPLETED
        assert ended.completed_ms is not None
        assert ended.completed_ms >= ended.created_ms

    async def takes_a_while(job: Job, _: Any) -> Ran:
        await asyncio.sleep(0.3)
        return Ran(Outcome.SUCCEEDED, "", Usage(1, None, None))

    play(tmp_path, story, script=takes_a_while, execution=Execution(lease_ms=60))


def test_what_a_killed_dispatcher_ran_is_run_again_but_not_for_ever(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        task = await submit(w)
        for attempt in (1, 2, 3):
            now = w.clock.steady_ms()
            await w.store.step(task.task_id, lambda t, now=now: t.lease_to("x", now, MINUTE))
            assert await w.executor.recover() == 1
            assert (await w.store.task(task.task_id)).attempt == attempt
        assert await w.status(task.task_id) is Status.FAILED
        assert await w.executor.recover() == 0
        lost = {"agent_type": "ai-engineer", "outcome": "lease-expired"}
        assert w.counted("task_attempts_total", **lost) == 3
        assert w.counted("task_retries_total", agent_type="ai-engineer") == 2

    play(tmp_path, story)


def test_output_is_bounded_and_says_so_once(tmp_path: Path) -> None:
    async def chatty(job: Job, on_output: Any) -> Ran:
        for _ in range(100):
            await on_output(b"x" * 1000)
        return Ran(Outcome.SUCCEEDED, "", Usage(1, None, None))

    async def story(w: World) -> None:
        task = await submit(w)
        await w.work(lambda: w.is_final(task.task_id))
        data, size = await w.tasks.logs(task.task_id, 0, 10**6)
        assert size == len(data) == 2500 + len(TRUNCATED)
        assert data.endswith(TRUNCATED)
        assert data.count(TRUNCATED) == 1

    play(tmp_path, story, script=chatty, execution=Execution(max_output=2500))


def test_a_full_disk_neither_ends_a_task_nor_the_executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(w: World) -> None:
        full = {"log": 1, "lease": 2, "renew": 1}

        async def append_log(*_: Any) -> None:
            full["log"] -= 1
            raise StorageFullError("full")

        step = w.store.step

        async def full_step(task_id: str, change: Any) -> Task:
            which = "renew" if w.runner.jobs else "lease"
            if full[which] > 0:
                full[which] -= 1
                raise StorageFullError("full")
            return await step(task_id, change)

        monkeypatch.setattr(w.store, "append_log", append_log)
        monkeypatch.setattr(w.store, "step", full_step)
        task = await submit(w)
        await w.work(lambda: w.is_final(task.task_id))
        assert await w.status(task.task_id) is Status.COMPLETED
        assert full == {"log": 0, "lease": 0, "renew": 0}

    async def slow(job: Job, on_output: Any) -> Ran:
        await on_output(b"x")
        await asyncio.sleep(0.2)
        return Ran(Outcome.SUCCEEDED, "", Usage(1, None, None))

    play(tmp_path, story, script=slow, execution=Execution(lease_ms=300))


def test_an_end_that_cannot_be_kept_is_tried_again_after_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(w: World) -> None:
        step, broken = w.store.step, [True]

        async def full_step(task_id: str, change: Any) -> Task:
            if w.runner.jobs and broken[0]:
                raise StorageFullError("full")
            return await step(task_id, change)

        monkeypatch.setattr(w.store, "step", full_step)
        task = await submit(w)

        async def ran() -> bool:
            return bool(w.runner.jobs)

        await w.work(ran)
        await asyncio.sleep(0.05)
        broken[0] = False
        w.clock.advance(MINUTE)
        assert await w.executor.sweep() == 1
        w.clock.advance(MINUTE)
        await w.work(lambda: w.is_final(task.task_id))
        assert await w.status(task.task_id) is Status.COMPLETED

    play(tmp_path, story)


def test_who_waits_for_the_next_attempt_does_not_wait_for_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(w: World) -> None:
        task = await submit(w)

        async def failed_once() -> bool:
            return (await w.store.task(task.task_id)).outcome is Outcome.ERROR

        await w.work(failed_once)
        w.clock.advance(3 * MINUTE)  # of the five that it waits
        await w.collect.refresh()
        assert w.counted("queue_oldest_seconds", state="pending") == 0
        w.clock.advance(3 * MINUTE)
        await w.collect.refresh()
        assert w.counted("queue_oldest_seconds", state="pending") == pytest.approx(60, abs=1)

    monkeypatch.setattr(SystemChance, "fraction", lambda _: 0.0)
    five = Backoff(10 * MINUTE, 1.0, 10 * MINUTE)
    play(tmp_path, story, script=fail, execution=Execution(backoff=five))


def test_what_no_task_can_be_run_without_costs_none_an_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute_agent_task, "UNAVAILABLE_MOST", 0.01)
    down = 5

    async def run(job: Job, on_output: Any) -> Ran:
        nonlocal down
        down -= 1
        if down >= 0:
            raise RunnerUnavailableError("the launcher cannot be reached")
        return await succeed(job, on_output)

    async def story(w: World) -> None:
        task = await submit(w)
        await w.work(lambda: w.is_final(task.task_id))
        done = await w.store.task(task.task_id)
        assert (done.status, done.attempt, len(w.runner.jobs)) == (Status.COMPLETED, 1, 6)
        kinds = {"agent_type": "ai-engineer"}
        assert w.counted("task_attempts_total", outcome="not-started", **kinds) == 0

    play(tmp_path, story, script=run)


def test_many_projects_are_forgotten_when_idle(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        for i in range(1500):
            w.executor._count(f"p{i}", 1)
            if i != 3:
                w.executor._count(f"p{i}", -1)
        assert len(w.executor._loads) <= 1000
        assert w.executor._loads["p3"].running == 1

    play(tmp_path, story)


# --- lists, metrics --------------------------------------------------------------------------


def test_pages_hold_everything_once_while_more_is_added(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        made = [(await submit(w, f"p{i % 2}")).task_id for i in range(7)]
        seen, cursor = [], None
        while True:
            page = await w.tasks.list(TaskFilter(), cursor, 3)
            seen += [t.task_id for t in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
            await submit(w)
        assert seen == made[::-1]
        found = await w.tasks.list(TaskFilter(project="p1", status=Status.PENDING), None, 10)
        assert [t.task_id for t in found.items] == made[1::2][::-1]
        for bad in ("x", "djE6", "djE6LTE", "é"):
            with pytest.raises(MalformedError):
                await w.tasks.list(TaskFilter(), bad, 3)
        for ask in (w.tasks.show("no"), w.tasks.show_event("no"), w.tasks.logs("no", 0, 1)):
            with pytest.raises(NotFoundError):
                await ask
        assert (await w.tasks.list_events(EventFilter(), None, 3)).items == []

    play(tmp_path, story)


def test_pushed_metrics_are_kept_all_or_none(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        good = Metric("tokens", 3.0, 10, {"model": "m"})
        with pytest.raises(InvalidError):
            await w.collect.push([good, Metric("not a name", 1, 0, {})])
        assert w.metrics.registry.get_sample_value("tokens", {"model": "m"}) is None
        await w.collect.push([good])
        await w.collect.push([Metric("tokens", 1.0, 5, {"model": "m"})])  # older: of no interest
        assert w.metrics.registry.get_sample_value("tokens", {"model": "m"}) == 3.0
        ahead = Metric("tokens", 9.0, w.clock.wall + 10 * MINUTE, {"model": "m"})
        with pytest.raises(InvalidError, match="ahead of the machine's clock"):
            await w.collect.push([ahead])
        many = [Metric("m", 1, 0, {"i": str(i)}) for i in range(MAX_SERIES)]
        with pytest.raises(InvalidError, match="series"):
            await w.collect.push(many)

    play(tmp_path, story)


def test_gauges_say_how_full_the_queue_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(w: World) -> None:
        await submit(w)
        await w.receive(b"{}")
        w.clock.advance(MINUTE)
        await w.collect.refresh()
        assert w.counted("queue_depth", state="pending") == 1
        assert w.counted("queue_depth", state="unprocessed") == 1
        assert w.counted("queue_oldest_seconds", state="pending") == 60
        assert w.counted("queue_oldest_seconds", state="unprocessed") == 60
        assert w.counted("store_bytes") > 0
        await submit(w)
        await w.collect.refresh()  # too soon
        assert w.counted("queue_depth", state="pending") == 1
        w.clock.advance(MINUTE)

        async def figures(_: int) -> None:
            raise StorageFullError("full")

        with monkeypatch.context() as m:
            m.setattr(w.store, "figures", figures)
            await w.collect.refresh()
        assert w.counted("queue_depth", state="pending") == 1
        await w.collect.refresh()
        assert w.counted("queue_depth", state="pending") == 2

    play(tmp_path, story)
