"""What a check is, and how checks are run.

A check is an expectation derived from the Plan, a probe that collects output (from the guest
over SSH, or from this host), and a pure judgement of that output. Checks that judge the same
output share a probe, which then runs once: a process in the guest costs 50-100 ms under TCG.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import queue
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ravectl import ssh
from ravectl.errors import RavectlError
from ravectl.model import CheckResult, Endpoint, EngineName, Outcome, Plan, Report, Suite

T = TypeVar("T")

WORKERS = 6  # less than the sessions that one SSH connection may have (ssh.MAX_CHANNELS)
GRACE_SECONDS = 5.0  # for a probe to notice by itself that its deadline has passed
MAX_FAULTS = 8
MAX_TEXT = 1500


@dataclass(frozen=True)
class Subject:
    """What a machine was built from: all that an expectation is derived from."""

    plan: Plan
    engine: EngineName

    def units(self) -> dict[str, str]:
        """The unit of each service, by the service's name."""
        return {s.name: full_unit(s.unit[self.engine.value]) for s in self.plan.services}

    def helpers(self) -> tuple[str, ...]:
        """The units without which those do not work as they should."""
        return self.plan.hardening.helpers[self.engine]


@dataclass(frozen=True)
class VerifyTarget:
    """A running machine and what is needed to ask it."""

    instance: str
    plan: Plan
    engine: EngineName
    image_digest: str
    endpoint: Endpoint
    connection: ssh.Connection
    ca_cert: Path
    ingress_user: str
    ingress_password: str = field(repr=False)
    router_key: str = field(repr=False)
    delivery: Mapping[str, str] = field(repr=False)  # what the guest was given, by file name
    hidden: Mapping[str, str] = field(repr=False)  # what must be seen nowhere, by name
    disks: Mapping[str, Path]  # on this host, by what they are: the machine's disk, its image
    host_started: float | None  # epoch seconds at which QEMU started; None: unknown
    inventory: Path | None = None  # of the image's files; None: the image has none

    @property
    def subject(self) -> Subject:
        """What the machine is held against."""
        return Subject(self.plan, self.engine)


@dataclass(frozen=True)
class Judgement:
    """Whether an expectation holds. `ran` is False when the output could not be judged."""

    ok: bool
    expected: str
    seen: str
    remedy: str = ""
    ran: bool = True


@dataclass(frozen=True)
class Probe:
    """Collects the output that one or more checks judge.

    `collect` gets the target and a time.monotonic() value by which it must be done, `seconds`
    after it began: some six times what it takes under emulation on a quiet host, so that a loaded
    one is not taken for a machine that hangs. A probe that runs `alone` measures time, so nothing
    else runs beside it.
    """

    name: str
    collect: Callable[[VerifyTarget, float], str]
    seconds: float
    alone: bool = False


@dataclass(frozen=True)
class Check:
    """A promise of the table in docs/verify.md."""

    id: str
    suite: Suite
    title: str
    probe: Probe
    judge: Callable[[Subject, str], Judgement]
    disruptive: bool = False


def full_unit(name: str) -> str:
    """A unit's name with its type, as systemd's Id and Names properties have it."""
    types = (".service", ".socket", ".timer", ".target", ".mount", ".path", ".slice")
    return name if name.endswith(types) else f"{name}.service"


def judged(expected: str, seen: str, faults: Sequence[str], remedy: str) -> Judgement:
    """Holds when there are no faults; otherwise the faults are what was seen."""
    if not faults:
        return Judgement(True, expected, seen)
    more = len(faults) - MAX_FAULTS
    text = "; ".join(faults[:MAX_FAULTS]) + (f"; and {more} more" if more > 0 else "")
    return Judgement(False, expected, text, remedy)


def unreadable(expected: str, why: str) -> Judgement:
    """The output says neither yes nor no, so the check did not run."""
    return Judgement(
        False,
        expected,
        f"the check got no usable answer: {why}",
        "run ravectl verify again; if it stays so, look at ravectl logs",
        ran=False,
    )


def execute(
    checks: Sequence[Check],
    target: VerifyTarget,
    on_result: Callable[[CheckResult], None] | None = None,
) -> Report:
    """Run the checks and report them in the order given.

    `on_result` is called from this thread with each result as it comes.
    """
    began, started = datetime.datetime.now(datetime.UTC), time.monotonic()
    results: dict[str, CheckResult] = {}
    together = [p for p in _probes(checks) if not p.alone]
    alone = [p for p in _probes(checks) if p.alone]
    for batch in (together, *([p] for p in alone)):
        for result in _run_batch(batch, checks, target):
            results[result.id] = result
            if on_result:
                on_result(result)
    return Report(
        instance=target.instance,
        profile=target.plan.profile,
        image=target.image_digest,
        results=tuple(results[c.id] for c in checks),
        seconds=time.monotonic() - started,
        started=began.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _probes(checks: Iterable[Check]) -> list[Probe]:
    # longest first, so that it does not start when the others are done
    return sorted(dict.fromkeys(c.probe for c in checks), key=lambda p: -p.seconds)


def _run_batch(
    probes: Sequence[Probe], checks: Sequence[Check], target: VerifyTarget
) -> Iterable[CheckResult]:
    """Run probes in parallel and yield the results of their checks as they come."""
    pending = {p: [c for c in checks if c.probe == p] for p in probes}
    todo: queue.SimpleQueue[Probe] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Probe, list[CheckResult]]] = queue.SimpleQueue()
    for probe in probes:
        todo.put(probe)

    def worker() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                probe = todo.get_nowait()
                done.put((probe, _examine(probe, pending[probe], target)))

    workers = min(WORKERS, len(probes))
    _start_threads([worker] * workers)
    rounds = -(-len(probes) // WORKERS)
    last = time.monotonic() + rounds * max((p.seconds for p in probes), default=0) + GRACE_SECONDS
    waiting = dict(pending)
    with contextlib.suppress(queue.Empty):
        while waiting:
            probe, results = done.get(timeout=max(last - time.monotonic(), 0.0))
            del waiting[probe]
            yield from results
    for check in (c for mine in waiting.values() for c in mine):
        hint = "see whether the machine still runs: ravectl status"
        yield _error(check, "the check did not end by its deadline", hint, 0.0)


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make calls in parallel; their results in the same order, or the first exception raised.

    For probes of several parts, each of which ends by its own deadline.
    """
    done: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()

    def make(i: int) -> None:
        try:
            done.put((i, calls[i]()))
        except Exception as e:
            done.put((i, e))

    _start_threads([functools.partial(make, i) for i in range(len(calls))])
    results: dict[int, T] = {}
    for _ in calls:
        i, value = done.get()
        if isinstance(value, Exception):
            raise value
        results[i] = value
    return [results[i] for i in range(len(calls))]


def _start_threads(bodies: Sequence[Callable[[], None]]) -> None:
    # daemons, unlike a ThreadPoolExecutor's: one that hangs must not hold up Ctrl-C or the exit
    for body in bodies:
        threading.Thread(target=body, name="verify", daemon=True).start()


def _examine(probe: Probe, checks: Sequence[Check], target: VerifyTarget) -> list[CheckResult]:
    started = time.monotonic()

    def spent() -> float:
        return time.monotonic() - started

    try:
        output = probe.collect(target, started + probe.seconds)
    except RavectlError as e:
        why = f"{e.message}: {e.details.splitlines()[-1]}" if e.details else e.message
        return [_error(c, why, e.hint, spent()) for c in checks]
    except OSError as e:
        hint = "see whether the machine still runs: ravectl status"
        return [_error(c, str(e) or type(e).__name__, hint, spent()) for c in checks]
    except Exception as e:  # a defect in one check must not hide the others
        # only its kind: the text may quote a request's headers
        hint = "this is a defect of ravectl: please report it"
        return [
            _error(c, f"the probe failed with {type(e).__name__}", hint, spent()) for c in checks
        ]
    seconds = spent()
    return [_judge(c, target.subject, output, seconds) for c in checks]


def _judge(check: Check, subject: Subject, output: str, seconds: float) -> CheckResult:
    try:
        found = check.judge(subject, output)
    except Exception as e:  # see _examine
        hint = "this is a defect of ravectl: please report it"
        return _error(check, f"the judgement failed with {type(e).__name__}", hint, seconds)
    held = Outcome.PASSED if found.ok else Outcome.FAILED
    outcome = held if found.ran else Outcome.ERROR
    return CheckResult(
        id=check.id,
        suite=check.suite,
        title=check.title,
        outcome=outcome,
        expected=clean(found.expected),
        seen=clean(found.seen),
        remedy="" if outcome is Outcome.PASSED else clean(found.remedy),
        seconds=seconds,
    )


def _error(check: Check, why: str, hint: str, seconds: float) -> CheckResult:
    return CheckResult(
        id=check.id,
        suite=check.suite,
        title=check.title,
        outcome=Outcome.ERROR,
        expected="the check can be run",
        seen=clean(why),
        remedy=clean(hint),
        seconds=seconds,
    )


def clean(text: str) -> str:
    """`text` fit to be shown: what a guest says may hold escape sequences."""
    flat = " ".join(text.split())
    safe = "".join("\ufffd" if unicodedata.category(c).startswith("C") else c for c in flat)
    return safe if len(safe) <= MAX_TEXT else safe[: MAX_TEXT - 1] + "…"
