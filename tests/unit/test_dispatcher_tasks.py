"""The life of a task: no illegal step, no lost lease, whatever the order and the clock."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rave_dispatcher.domain.events import Trace
from rave_dispatcher.domain.tasks import (
    AgentType,
    Backoff,
    IllegalStepError,
    Lease,
    Outcome,
    Status,
    Task,
    Usage,
)

LEASE = 1000
USAGE = Usage(10, None, None)
TRACE = Trace("0" * 31 + "1", "0" * 15 + "1")


def make(**changes: object) -> Task:
    task = Task("t", AgentType.AI_ENGINEER, "do", 0, TRACE)
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]


class TaskLife(RuleBasedStateMachine):
    """Several runners, some of them slow or dead, and a person work on one task.

    `held` is kept apart from the task: who may believe that the task is theirs.
    """

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.task = make()
        self.now = 0
        self.count = 0
        self.held: Lease | None = None
        self.ran = 0  # attempts that began since the last replay

    def tried(self, legal: bool, step: object) -> bool:
        """Take a step; it must succeed exactly when it is legal, and else change nothing."""
        before = self.task
        try:
            self.task = step()  # type: ignore[operator]
        except IllegalStepError:
            assert not legal
            assert self.task == before
            return False
        assert legal
        return True

    def owns(self, token: str) -> bool:
        return self.held is not None and self.held.token == token and self.held.until_ms > self.now

    @rule(ms=st.integers(0, 3 * LEASE))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    @rule(target=leases)
    def lease(self) -> str:
        self.count += 1
        token = str(self.count)
        legal = self.task.status is Status.PENDING and self.task.not_before_ms <= self.now
        if self.tried(legal, lambda: self.task.lease_to(token, self.now, LEASE)):
            assert self.held is None, "two hold the same task"
            self.held = Lease(token, self.now + LEASE)
            self.ran += 1
        return token

    @rule(token=leases)
    def renew(self, token: str) -> None:
        if self.tried(self.owns(token), lambda: self.task.renew(token, self.now, LEASE)):
            self.held = Lease(token, self.now + LEASE)

    @rule(token=consumes(leases), wall=st.integers(-(10**6), 10**6))
    def succeed(self, token: str, wall: int) -> None:
        if self.tried(self.owns(token), lambda: self.task.succeed(token, USAGE, self.now, wall)):
            self.held = None
            assert self.task.status is Status.COMPLETED

    @rule(token=consumes(leases), delay=st.integers(0, LEASE))
    def fail(self, token: str, delay: int) -> None:
        cancelled = self.task.cancel_requested
        if self.tried(
            self.owns(token),
            lambda: self.task.fail(token, Outcome.ERROR, "x", USAGE, self.now, 0, delay),
        ):
            self.held = None
            self.is_retried_or_over(cancelled)

    @rule(delay=st.integers(0, LEASE))
    def expire(self, delay: int) -> None:
        cancelled = self.task.cancel_requested
        legal = self.held is not None and self.held.until_ms <= self.now
        if self.tried(legal, lambda: self.task.expire(self.now, 0, delay)):
            self.held = None
            self.is_retried_or_over(cancelled)

    def is_retried_or_over(self, cancelled: bool) -> None:
        if cancelled:
            assert (self.task.status, self.task.outcome) == (Status.FAILED, Outcome.CANCELLED)
        elif self.ran >= self.task.max_attempts:
            assert self.task.status is Status.FAILED
        else:
            assert self.task.status is Status.PENDING

    @rule()
    def recover(self) -> None:
        cancelled = self.task.cancel_requested
        if self.tried(self.held is not None, lambda: self.task.recover(self.now, 0)):
            self.held = None
            self.is_retried_or_over(cancelled)

    @rule(token=consumes(leases))
    def release(self, token: str) -> None:
        cancelled = self.task.cancel_requested
        if self.tried(self.owns(token), lambda: self.task.release(token, self.now, 0)):
            self.held = None
            self.ran -= 0 if cancelled else 1

    @rule()
    def cancel(self) -> None:
        legal = self.task.status in (Status.PENDING, Status.RUNNING)
        self.tried(legal, lambda: self.task.cancel(0))

    @rule()
    def replay(self) -> None:
        legal = self.task.status is Status.FAILED
        if self.tried(legal, lambda: self.task.replay(self.now)):
            self.ran = 0

    @invariant()
    def is_consistent(self) -> None:
        t = self.task
        assert t.lease == self.held
        assert (t.status is Status.RUNNING) == (t.lease is not None)
        assert t.status.is_final == (t.completed_ms is not None)
        assert 0 <= t.attempt <= t.max_attempts
        assert t.attempt == self.ran
        if t.completed_ms is not None:
            assert t.completed_ms >= t.created_ms
            assert t.outcome is not None
        if t.status is Status.COMPLETED:
            assert t.outcome is Outcome.SUCCEEDED


TestTaskLife = TaskLife.TestCase
TestTaskLife.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


@given(
    st.integers(1, 10**6), st.floats(1, 10), st.integers(1, 10**8), st.integers(0, 10**6),
    st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_a_delay_is_bounded_and_never_less_than_half(
    base: int, factor: float, most: int, attempt: int, chance: float
) -> None:
    backoff = Backoff(base, factor, most)
    step = min(base * factor ** min(max(attempt - 1, 0), 64), most)
    assert step / 2 - 1 <= backoff.delay_ms(attempt, chance) <= step


def test_delays_double() -> None:
    backoff = Backoff(1000, 2.0, 60_000)
    assert [backoff.delay_ms(n, 0.0) for n in (1, 2, 3, 4, 9)] == [500, 1000, 2000, 4000, 30_000]


def test_a_superseded_token_is_told_so() -> None:
    task = make().lease_to("a", 0, LEASE).expire(LEASE, 0, 0).lease_to("b", LEASE, LEASE)
    with pytest.raises(IllegalStepError, match="leased to another"):
        task.succeed("a", USAGE, LEASE + 1, 0)


def test_the_last_failure_says_why() -> None:
    task = make(max_attempts=1).lease_to("a", 0, LEASE)
    task = task.fail("a", Outcome.OUT_OF_MEMORY, "too much", USAGE, 1, 5, 0)
    assert (task.status, task.outcome, task.detail, task.completed_ms, task.usage) == (
        Status.FAILED, Outcome.OUT_OF_MEMORY, "too much", 5, USAGE,
    )  # fmt: skip


def test_a_running_task_that_is_cancelled_may_still_succeed() -> None:
    task = make().lease_to("a", 0, LEASE).cancel(0)
    assert task.renew("a", 1, LEASE).cancel_requested
    assert task.succeed("a", USAGE, 1, 1).status is Status.COMPLETED


def test_who_was_given_back_has_waited_since_it_might_run() -> None:
    """Not since it was given back: each try would begin its waiting anew, and nobody be told."""
    task = make(not_before_ms=5)
    back = task.lease_to("token", 1000, LEASE).release("token", 1500, 1500)
    assert (back.status, back.attempt, back.not_before_ms) == (Status.PENDING, 0, 5)
