"""The table of the checks, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Final

from ravectl.errors import UsageError
from ravectl.model import CheckResult, Report, Suite
from ravectl.verify import (
    alerting,
    attempts,
    database,
    events,
    hardening,
    http,
    integrity,
    observability,
    recovery,
    secrecy,
    security,
    service,
)
from ravectl.verify.explanations import text
from ravectl.verify.framework import Check, VerifyTarget, execute

CHECKS: Final[tuple[Check, ...]] = (
    *service.CHECKS,
    *recovery.CHECKS,
    *http.CHECKS,
    *events.HTTP_CHECKS,
    *database.CHECKS,
    *events.DATA_CHECKS,
    *alerting.DATA_CHECKS,
    *secrecy.CHECKS[1:],
    *security.CHECKS,
    *attempts.CHECKS,
    *secrecy.CHECKS[:1],
    *hardening.CHECKS,
    *integrity.CHECKS,
    *observability.CHECKS,
    *alerting.OBSERVABILITY_CHECKS,
    *events.OBSERVABILITY_CHECKS,
)


def select(
    suites: Set[Suite] | None = None, ids: Set[str] | None = None, *, disruptive: bool = False
) -> tuple[Check, ...]:
    """The checks of the suites and ids asked for (None: all), in the order of the table.

    Disruptive ones only if asked for, by `disruptive` or by id. Raises UsageError for an id
    that does not exist and when nothing is left: a verification of nothing is no pass.
    """
    wanted = None if ids is None else {i.upper() for i in ids}
    unknown = sorted((wanted or set()) - {c.id for c in CHECKS})
    known = ", ".join(c.id for c in CHECKS)
    if unknown:
        raise UsageError(f"there is no check {unknown[0]!r}", f"the checks are: {known}")
    chosen = tuple(
        c
        for c in CHECKS
        if (suites is None or c.suite in suites)
        and (c.id in wanted if wanted is not None else disruptive or not c.disruptive)
    )
    if not chosen:
        raise UsageError(
            "no check is both in the suites and among the ids asked for", f"the checks are: {known}"
        )
    return chosen


def explain(id_: str) -> str:
    """What a check does and why, for a person. Raises UsageError for an id that does not exist."""
    (check,) = select(ids={id_})
    return text(check.id, check.title, check.suite.value, disruptive=check.disruptive)


def run(
    target: VerifyTarget,
    suites: Set[Suite] | None = None,
    ids: Set[str] | None = None,
    on_result: Callable[[CheckResult], None] | None = None,
    *,
    disruptive: bool = False,
) -> Report:
    """Hold a running machine against its Plan; `on_result` gets each result as it comes."""
    chosen = select(suites, ids, disruptive=disruptive)
    left = tuple(c.id for c in CHECKS if c not in chosen)
    return replace(execute(chosen, target, on_result), not_checked=left)
