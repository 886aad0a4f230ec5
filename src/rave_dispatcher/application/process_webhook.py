"""ProcessWebhook: verify, store durably, then (apart from the answer) see what the rules say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from rave_dispatcher.application.errors import DispatcherError, MalformedError, NotFoundError
from rave_dispatcher.application.ports import (
    Chance,
    Clock,
    Decision,
    Incoming,
    Log,
    Observer,
    Receipt,
    Store,
    Tracer,
    Verified,
    Verifier,
)
from rave_dispatcher.domain.events import MAX_TYPE, Event, Trace, project_of, too_deep, type_of
from rave_dispatcher.domain.ids import make_uuid
from rave_dispatcher.domain.rules import Rule, concerned, first_match
from rave_dispatcher.domain.tasks import Task

MAX_DELIVERY_ID = 200
BATCH = 200


@dataclass(frozen=True)
class Policy:
    """What is taken, and what becomes of it."""

    rules: tuple[Rule, ...] = ()
    max_depth: int = 64
    max_attempts: int = 3


class ProcessWebhook:
    """The way of an event from the request to a task."""

    def __init__(
        self,
        store: Store,
        verifier: Verifier,
        clock: Clock,
        chance: Chance,
        tracer: Tracer,
        observer: Observer,
        log: Log,
        policy: Policy,
        bounded: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._store, self._verifier = store, verifier
        self._clock, self._chance = clock, chance
        self._tracer, self._observer, self._log = tracer, observer, log
        self._policy, self._bounded = policy, bounded

    async def receive(
        self, source: str, headers: Mapping[str, str], body: bytes, trace: Trace
    ) -> Receipt:
        """Verify a delivery and keep it. It is on the disk when this returns."""
        try:
            verified = self._verifier.verify(source, headers, body)
            event = self._event(source, verified, body, trace)
            receipt = await self._store.add_event(event)
        except DispatcherError as e:
            # of a source that is not configured anybody may invent more names than fit a metric
            known = "unknown" if isinstance(e, NotFoundError) else source
            self._observer.refused(known, getattr(e, "reason", e.slug))
            raise
        self._observer.received(source, receipt.duplicate)
        return receipt

    async def accept(self, source: str, verified: Verified, body: bytes, trace: Trace) -> Receipt:
        """Keep what came from a sender that was verified by other means."""
        receipt = await self._store.add_event(self._event(source, verified, body, trace))
        self._observer.received(source, receipt.duplicate)
        return receipt

    def _event(self, source: str, verified: Verified, body: bytes, trace: Trace) -> Event:
        if not verified.delivery_id or len(verified.delivery_id) > MAX_DELIVERY_ID:
            raise MalformedError(
                f"a delivery needs an id of 1 to {MAX_DELIVERY_ID} characters in its headers"
            )
        payload = parse(body, self._policy.max_depth)
        event_type = verified.event_type or type_of(payload)
        if not event_type or len(event_type) > MAX_TYPE:
            raise MalformedError(f"a delivery needs a type of 1 to {MAX_TYPE} characters")
        now = self._clock.wall_ms()
        return Event(
            event_uuid=make_uuid(now, self._chance.token(10)),
            source=source,
            delivery_id=verified.delivery_id,
            event_type=event_type,
            project=project_of(payload),
            received_ms=now,
            payload=body,
            signature=verified.signature,
            trace=trace,
        )

    async def process(self) -> int:
        """Show the rules the events that they have not seen, at most a batch; how many it was."""
        batch = await self._store.incoming(BATCH)
        if not batch:
            return 0
        decisions = [await self._decide(incoming) for incoming in batch]
        await self._store.decide(decisions)
        now = self._clock.wall_ms()
        for incoming, decision in zip(batch, decisions, strict=True):
            took = max(now - incoming.received_ms, 0) / 1000
            seconds = None if incoming.replayed else took
            became = decision.task is not None
            self._observer.processed(seconds, became, incoming.trace.trace_id)
        return len(batch)

    async def _decide(self, incoming: Incoming) -> Decision:
        rules = concerned(self._policy.rules, incoming.source, incoming.event_type)
        if not rules:
            return Decision(incoming.event_uuid, None)
        attributes = {
            "rave.event_uuid": incoming.event_uuid,
            "rave.event_type": incoming.event_type,
            "rave.source": incoming.source,
        }
        with self._tracer.span("event", incoming.trace, attributes) as span:
            task = await self._task(incoming, rules, span.trace)
            span.set("rave.task_id", task.task_id if task else "")
            return Decision(incoming.event_uuid, task)

    async def _task(self, incoming: Incoming, rules: Sequence[Rule], trace: Trace) -> Task | None:
        payload = from_json(await self._store.payload(incoming.event_uuid))
        try:
            # payloads are written by others: one must not stop all that comes after it
            with self._bounded():
                rule = first_match(rules, payload)
                prompt = rule.render(payload) if rule else ""
        except Exception as e:  # a rule must not hold up the events behind this one
            self._observer.rules_failed()
            self._log.error(
                "the rules failed on an event; it becomes no task",
                event_uuid=incoming.event_uuid, error=type(e).__name__,
                trace_id=incoming.trace.trace_id,
            )  # fmt: skip
            return None
        if rule is None:
            return None
        now = self._clock.wall_ms()
        return Task(
            task_id=make_uuid(now, self._chance.token(10)),
            agent_type=rule.agent_type,
            prompt=prompt,
            created_ms=now,
            trace=trace,
            project=incoming.project,
            priority=rule.priority,
            max_attempts=rule.max_attempts or self._policy.max_attempts,
            event_uuid=incoming.event_uuid,
            rule=rule.name,
            not_before_ms=self._clock.steady_ms(),
        )


def parse(body: bytes, max_depth: int) -> Any:
    """The JSON in a body; MalformedError when it is none, or nests deeper than is taken."""
    try:
        payload = from_json(body, allow_inf_nan=False)
    except ValueError as e:
        # the parser's words name a position; they do not quote the body
        raise MalformedError(f"the body is not JSON: {str(e)[:120]}") from None
    if not isinstance(payload, dict | list):
        raise MalformedError("the body must be a JSON object or array")
    if too_deep(body, payload, max_depth):
        raise MalformedError(f"the body nests deeper than {max_depth} levels")
    return payload
