"""Queue, rules, events and metrics."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_dispatcher.domain.events import NO_PROJECT, project_of, too_deep, type_of
from rave_dispatcher.domain.ids import make_uuid
from rave_dispatcher.domain.metrics import MAX_LABELS, Metric, fault_of
from rave_dispatcher.domain.queue import AGED_MOST, AGING_MS, Load, Waiting, choose
from rave_dispatcher.domain.rules import (
    MAX_PROMPT,
    Condition,
    Rule,
    RuleError,
    concerned,
    first_match,
)
from rave_dispatcher.domain.tasks import MAX_PRIORITY, AgentType

# --- queue -----------------------------------------------------------------------------------


def waiting(seq: int, project: str, priority: int = 5, since: int = 0) -> Waiting:
    return Waiting(str(seq), project, priority, since, seq)


def test_nothing_waits() -> None:
    assert choose([], {}, 0) is None


def test_a_higher_priority_goes_first() -> None:
    chosen = choose([waiting(1, "a", 3), waiting(2, "b", 7)], {}, 0)
    assert chosen is not None
    assert chosen.seq == 2


def test_the_project_with_fewer_running_goes_first() -> None:
    chosen = choose([waiting(1, "a"), waiting(2, "b")], {"a": Load(2, 1), "b": Load(1, 9)}, 0)
    assert chosen is not None
    assert chosen.project == "b"


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6))
def test_projects_take_turns_however_many_tasks_each_has(counts: list[int]) -> None:
    """While two projects both wait, neither gets two turns more than the other."""
    queues = {
        f"p{i}": [waiting(i * 1000 + n, f"p{i}") for n in range(count)]
        for i, count in enumerate(counts)
    }
    loads: dict[str, Load] = {}
    served: Counter[str] = Counter()
    for turn in range(1, sum(counts) + 1):
        chosen = choose([q[0] for q in queues.values() if q], loads, 0)
        assert chosen is not None
        queues[chosen.project].pop(0)
        served[chosen.project] += 1
        loads[chosen.project] = Load(0, turn)
        still = [served[p] for p, q in queues.items() if q]
        assert not still or max(still) - min(still) <= 1
    assert choose([], loads, 0) is None


def test_what_one_project_brought_long_ago_does_not_all_go_first() -> None:
    """A brings 300 tasks of a minute; B comes a quarter of an hour later with one."""
    minute = 60_000
    queue = [waiting(n, "a") for n in range(300)]
    late = waiting(1000, "b", since=15 * minute)
    loads: dict[str, Load] = {}
    for turn in range(300):
        now = turn * minute
        chosen = choose([queue[0], *([late] if now >= late.since_ms else [])], loads, now)
        assert chosen is not None
        if chosen is late:
            break
        queue.pop(0)
        loads["a"] = Load(0, turn, ((5, now),))
    assert now - late.since_ms <= minute


@given(st.integers(0, MAX_PRIORITY), st.integers(0, MAX_PRIORITY))
def test_nobody_waits_for_ever(mine: int, others: int) -> None:
    """What has waited for the longest aging is ahead of all that came just now."""
    now = AGING_MS * AGED_MOST
    chosen = choose([waiting(2, "new", others, now), waiting(1, "old", mine, 0)], {}, now)
    assert chosen is not None
    assert chosen.project == "old"


# --- rules -----------------------------------------------------------------------------------

PAYLOAD = {
    "object_kind": "merge_request",
    "object_attributes": {"title": "Fix", "draft": False, "iid": 7, "labels": ["a", "b"]},
    "project": {"path_with_namespace": "group/project"},
}


def make(**changes: Any) -> Rule:
    return Rule(**{"name": "r", "agent_type": AgentType.AI_ENGINEER, "prompt": "", **changes})


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (Condition("$.object_attributes.title"), True),
        (Condition("$.nowhere"), False),
        (Condition("$.nowhere", negate=True), True),
        (Condition("$.object_attributes.draft", equals=False, has_equals=True), True),
        (Condition("$.object_attributes.draft", equals=0, has_equals=True), False),
        (Condition("$.object_attributes.iid", equals=7, has_equals=True), True),
        (Condition("$.object_attributes.iid", equals="7", has_equals=True), False),
        (Condition("$.object_attributes.labels[*]", equals="b", has_equals=True), True),
        (Condition("$.object_attributes.title", matches="^F"), True),
        (Condition("$.object_attributes.title", matches="^f"), False),
        (Condition("$.object_attributes.iid", matches="7"), False),
        (Condition("$..iid", equals=7, has_equals=True), True),
    ],
)
def test_conditions(condition: Condition, holds: bool) -> None:
    assert condition.holds(PAYLOAD) is holds


@pytest.mark.parametrize(
    "payload", [None, [], "x", 7, {"object_attributes": []}, {"object_attributes": None}]
)
def test_a_condition_on_another_payload_is_false_not_an_error(payload: Any) -> None:
    assert not Condition("$.object_attributes.title").holds(payload)
    assert not Condition("$.object_attributes[?@.x > 1].y").holds(payload)


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Condition("$["), "not a JSONPath"),
        (lambda: Condition("$.a", matches="("), "condition on"),
        (lambda: Condition("$.a", equals=1, has_equals=True, matches="x"), "not both"),
        (lambda: make(prompt="{{ $[ }}"), "not a JSONPath"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(make_it: Any, words: str) -> None:
    with pytest.raises(RuleError, match=words):
        make_it()


def test_a_prompt_takes_what_the_payload_has() -> None:
    prompt = "{{ $.object_attributes.title }} #{{$..iid}} ({{ $..labels[*] }}){{ $.no }}"
    assert make(prompt=prompt).render(PAYLOAD) == "Fix #7 (a, b)"


def test_a_prompt_takes_no_more_of_a_payload_than_fits() -> None:
    rule = Rule("r", AgentType.AI_ENGINEER, "{{ $..* }}")
    seen = []

    class Many(dict[str, Any]):
        def values(self) -> Any:  # counts how far the rule looks
            for n in range(10**6):
                seen.append(n)
                yield "x" * 1000

        def items(self) -> Any:
            return ((str(n), v) for n, v in enumerate(self.values()))

    assert len(rule.render(Many(a=1))) == MAX_PROMPT
    assert len(seen) < 200


def test_what_the_payload_says_is_no_template() -> None:
    """A sender cannot have other parts of the payload, or anything, put in."""
    rule = make(prompt="{{ $.a }}")
    assert rule.render({"a": "{{ $.secret }}", "secret": "s"}) == "{{ $.secret }}"


def test_types_and_sources_are_globs() -> None:
    rule = make(types=("pull_request*", "Merge Request Hook"), sources=("git*",))
    assert rule.concerns("github", "pull_request_review")
    assert rule.concerns("gitlab", "Merge Request Hook")
    assert not rule.concerns("gitlab", "merge request hook")
    assert not rule.concerns("standard", "pull_request")


def test_the_first_rule_that_matches_decides() -> None:
    rules = [
        make(name="other", types=("push",)),
        make(name="draft", conditions=(Condition("$.a", equals=1, has_equals=True),)),
        make(name="any"),
        make(name="never reached"),
    ]
    mine = concerned(rules, "gitlab", "x")
    assert [r.name for r in mine] == ["draft", "any", "never reached"]
    first, second = first_match(mine, {"a": 1}), first_match(mine, {"a": 2})
    assert first is not None
    assert second is not None
    assert (first.name, second.name) == ("draft", "any")
    assert first_match(mine[:1], {}) is None


# --- events ----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@given(JSON, st.integers(1, 5))
def test_depth_is_judged_exactly(value: Any, most: int) -> None:
    assert too_deep(json.dumps(value).encode(), value, most) == (depth(value) > most)


@given(JSON)
def test_any_payload_has_a_project_and_perhaps_a_type(value: Any) -> None:
    assert project_of(value)
    assert isinstance(type_of(value), str | None)


@pytest.mark.parametrize(
    ("payload", "project"),
    [
        (PAYLOAD, "group/project"),
        ({"repository": {"full_name": "o/r"}}, "o/r"),
        ({"organization": {"login": "o"}}, "o"),
        ({"project_path": "g/p"}, "g/p"),
        ({"project": {"path_with_namespace": 7}}, NO_PROJECT),
        ([], NO_PROJECT),
    ],
)
def test_project(payload: Any, project: str) -> None:
    assert project_of(payload) == project


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10))
def test_ids_are_uuids_in_the_order_of_time(a: int, b: int, randomness: bytes) -> None:
    first, second = make_uuid(a, randomness), make_uuid(b, randomness)
    assert uuid.UUID(first).version == 7
    assert uuid.UUID(first).variant == uuid.RFC_4122
    assert (first < second) == (a < b)


# --- metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("ok_1", {"a": "b"}, None),
        ("1x", {}, "metric_name"),
        ("a" * 101, {}, "metric_name"),
        ("rave_dispatcher_x", {}, "must not begin"),
        ("x", {"__a": ""}, "labels"),
        ("x", {"a-b": ""}, "labels"),
        ("x", {"a": "v" * 101}, "value"),
        ("x", {f"l{i}": "" for i in range(MAX_LABELS + 1)}, "at most"),
    ],
)
def test_metrics_that_prometheus_would_not_take(
    name: str, labels: dict[str, str], words: str | None
) -> None:
    fault = fault_of(name, labels)
    assert fault is None if words is None else words in str(fault)


def test_series_do_not_depend_on_the_order_of_labels() -> None:
    a = Metric("m", 1, 0, {"x": "1", "y": "2"})
    b = Metric("m", 2, 9, {"y": "2", "x": "1"})
    assert a.series == b.series
