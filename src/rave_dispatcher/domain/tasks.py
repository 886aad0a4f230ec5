"""Agent tasks and the steps that they may take. Pure: times and randomness come as arguments.

    pending --lease--> running --succeed--> completed
       ^                  |
       |                  +--fail, expire--> pending again after a delay, while attempts are left
       |                  |                  failed (dead letter) after the last one
       |                  +--release-------> pending at once, and the attempt does not count
       |                  +--recover-------> as fail, at once: the dispatcher was killed
       +--replay-- failed |
                          +--fail, expire after cancel--> failed (cancelled)
    pending --cancel--> failed (cancelled)

A lease is a token and a time. Whoever holds the token may take the steps of a running task,
until that time; with a token that was superseded every step is illegal, so that a runner that
was believed dead cannot change a task that another one holds.

Times are milliseconds of a clock that never jumps (ports.Clock.steady_ms), but for created_ms
and completed_ms, which are of the wall's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from rave_dispatcher.domain.events import NO_PROJECT, Trace

MIN_PRIORITY, MAX_PRIORITY = 0, 9
DEFAULT_PRIORITY = 5


class AgentType(enum.StrEnum):
    """Who does a task."""

    BACKEND_ARCHITECT = "backend-architect"
    FRONTEND_DEVELOPER = "frontend-developer"
    AI_ENGINEER = "ai-engineer"


class Status(enum.StrEnum):
    """How far a task is."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether nothing but a replay changes it."""
        return self in (Status.COMPLETED, Status.FAILED)


class Outcome(enum.StrEnum):
    """Why a task, or an attempt at one, ended."""

    SUCCEEDED = "succeeded"
    ERROR = "error"  # the agent said so, by its exit code
    TIMED_OUT = "timed-out"
    OUT_OF_MEMORY = "out-of-memory"
    CANCELLED = "cancelled"
    LEASE_EXPIRED = "lease-expired"  # whoever ran it was not heard of any more
    NOT_STARTED = "not-started"  # the agent's command could not be run


class IllegalStepError(Exception):
    """A task was asked to take a step that its state does not have."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a task, until a time."""

    token: str
    until_ms: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a task used, as its cgroup counted. None: it could not be counted, never a guess."""

    duration_ms: int
    memory_usage_mb: float | None
    cpu_usage_percent: float | None


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before the next attempt: exponential, bounded, with jitter."""

    base_ms: int = 5_000
    factor: float = 2.0
    most_ms: int = 600_000

    def delay_ms(self, attempt: int, chance: float) -> int:
        """The delay after the `attempt`th attempt failed; `chance` is in [0, 1).

        Half of the exponential step is fixed, half is random ("equal jitter"): tasks that
        failed together do not come back together, and none comes back at once.
        """
        exponent = min(max(attempt - 1, 0), 64)  # beyond any bound, and no float overflows
        step = min(self.base_ms * self.factor**exponent, float(self.most_ms))
        return int(step / 2 + step / 2 * chance)


@dataclass(frozen=True, slots=True)
class Task:
    """A task for an agent. Every step gives another Task; IllegalStepError when it has none."""

    task_id: str
    agent_type: AgentType
    prompt: str
    created_ms: int
    trace: Trace
    project: str = NO_PROJECT
    priority: int = DEFAULT_PRIORITY
    max_attempts: int = 3
    event_uuid: str | None = None
    rule: str | None = None  # the name of the rule that made it of an event
    status: Status = Status.PENDING
    attempt: int = 0
    not_before_ms: int = 0
    lease: Lease | None = None
    cancel_requested: bool = False
    outcome: Outcome | None = None
    detail: str = ""
    completed_ms: int | None = None
    usage: Usage | None = None

    def is_ready(self, now_ms: int) -> bool:
        """Whether it may be leased."""
        return self.status is Status.PENDING and self.not_before_ms <= now_ms

    def lease_to(self, token: str, now_ms: int, lease_ms: int) -> Task:
        """Begin an attempt."""
        if not self.is_ready(now_ms):
            raise self._illegal("lease")
        return replace(
            self,
            status=Status.RUNNING,
            attempt=self.attempt + 1,
            lease=Lease(token, now_ms + lease_ms),
            outcome=None,
            detail="",
        )

    def renew(self, token: str, now_ms: int, lease_ms: int) -> Task:
        """Go on; also says whether to stop (`cancel_requested`)."""
        self._require_lease(token, now_ms, "renew")
        return replace(self, lease=Lease(token, now_ms + lease_ms))

    def succeed(self, token: str, usage: Usage, now_ms: int, wall_ms: int) -> Task:
        """The agent is done."""
        self._require_lease(token, now_ms, "succeed")
        return self._ended(Status.COMPLETED, Outcome.SUCCEEDED, "", wall_ms, usage)

    def fail(
        self,
        token: str,
        outcome: Outcome,
        detail: str,
        usage: Usage | None,
        now_ms: int,
        wall_ms: int,
        delay_ms: int,
    ) -> Task:
        """The attempt failed: again after a delay, or to the dead letters."""
        self._require_lease(token, now_ms, "fail")
        return self._attempt_lost(outcome, detail, usage, now_ms, wall_ms, delay_ms)

    def expire(self, now_ms: int, wall_ms: int, delay_ms: int) -> Task:
        """Nobody renewed the lease in time."""
        if self.status is not Status.RUNNING or self.lease is None:
            raise self._illegal("expire")
        if self.lease.until_ms > now_ms:
            raise self._illegal("expire before its time")
        detail = "whoever ran the task was not heard of any more"
        return self._attempt_lost(Outcome.LEASE_EXPIRED, detail, None, now_ms, wall_ms, delay_ms)

    def recover(self, now_ms: int, wall_ms: int) -> Task:
        """The dispatcher starts, so nobody can hold this lease any more.

        The attempt counts: a task that brings the dispatcher down must not do so for ever.
        """
        if self.status is not Status.RUNNING:
            raise self._illegal("recover")
        detail = "the dispatcher ended while the task ran"
        return self._attempt_lost(Outcome.LEASE_EXPIRED, detail, None, now_ms, wall_ms, 0)

    def release(self, token: str, now_ms: int, wall_ms: int) -> Task:
        """Give the task back: the dispatcher stops. This attempt does not count."""
        self._require_lease(token, now_ms, "release")
        if self.cancel_requested:
            return self._ended(Status.FAILED, Outcome.CANCELLED, "", wall_ms, None)
        return replace(
            self,
            status=Status.PENDING,
            lease=None,
            attempt=max(self.attempt - 1, 0),
        )

    def cancel(self, wall_ms: int) -> Task:
        """A person does not want it any more. A running one ends when its runner sees that."""
        if self.status is Status.PENDING:
            return self._ended(Status.FAILED, Outcome.CANCELLED, "", wall_ms, None)
        if self.status is Status.RUNNING:
            return replace(self, cancel_requested=True)
        raise self._illegal("cancel")

    def replay(self, now_ms: int) -> Task:
        """Try a failed task anew, with all its attempts."""
        if self.status is not Status.FAILED:
            raise self._illegal("replay")
        return replace(
            self,
            status=Status.PENDING,
            attempt=0,
            not_before_ms=now_ms,
            outcome=None,
            detail="",
            completed_ms=None,
            usage=None,
            cancel_requested=False,
        )

    def _attempt_lost(
        self,
        outcome: Outcome,
        detail: str,
        usage: Usage | None,
        now_ms: int,
        wall_ms: int,
        delay_ms: int,
    ) -> Task:
        if self.cancel_requested:
            return self._ended(Status.FAILED, Outcome.CANCELLED, detail, wall_ms, usage)
        if self.attempt >= self.max_attempts:
            return self._ended(Status.FAILED, outcome, detail, wall_ms, usage)
        return replace(
            self,
            status=Status.PENDING,
            lease=None,
            not_before_ms=now_ms + delay_ms,
            outcome=outcome,
            detail=detail,
            usage=usage,
        )

    def _ended(
        self, status: Status, outcome: Outcome, detail: str, wall_ms: int, usage: Usage | None
    ) -> Task:
        return replace(
            self,
            status=status,
            lease=None,
            outcome=outcome,
            detail=detail,
            # a clock that was set back must not make an end precede its beginning
            completed_ms=max(wall_ms, self.created_ms),
            usage=usage,
            cancel_requested=False,
        )

    def _require_lease(self, token: str, now_ms: int, step: str) -> None:
        if self.status is not Status.RUNNING or self.lease is None:
            raise self._illegal(step)
        if self.lease.token != token:
            raise IllegalStepError(f"cannot {step}: task {self.task_id} is leased to another")
        if self.lease.until_ms <= now_ms:
            raise IllegalStepError(f"cannot {step}: the lease of task {self.task_id} is over")

    def _illegal(self, step: str) -> IllegalStepError:
        return IllegalStepError(f"cannot {step}: task {self.task_id} is {self.status}")
