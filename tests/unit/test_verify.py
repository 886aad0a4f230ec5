"""How checks are chosen, run and reported: one that goes wrong never hides another."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jsonschema_rs
import pytest

from ravectl import profile, verify
from ravectl.errors import RavectlError, UsageError
from ravectl.model import CheckResult, Endpoint, EngineName, Outcome, Report, Suite
from ravectl.plan import make_plan
from ravectl.verify import alerting, framework
from ravectl.verify.explanations import EXPLANATIONS
from ravectl.verify.framework import Check, Judgement, Probe, Subject, VerifyTarget, judged
from ravectl.verify.http import console_faults

PLAN = make_plan(**profile.select("safe", {}, None).plan_arguments())
TARGET = VerifyTarget(
    instance="default", plan=PLAN, engine=EngineName.DEBIAN, image_digest="0123456789abcdef",
    endpoint=cast(Endpoint, None), connection=cast(Any, None), ca_cert=Path("ca.crt"),
    ingress_user="rave", ingress_password="p4ssw0rd-of-the-ingress",
    router_key="k3y-of-the-router", delivery={}, hidden={}, disks={}, host_started=None,
)  # fmt: skip


def saying(text: str) -> Callable[[VerifyTarget, float], str]:
    return lambda _target, _deadline: text


def failing(error: Exception) -> Callable[[VerifyTarget, float], str]:
    def collect(_target: VerifyTarget, _deadline: float) -> str:
        raise error

    return collect


def holds(_: Subject, output: str) -> Judgement:
    return judged("it says yes", output, [] if output == "yes" else [output], "make it say yes")


def check(
    id_: str,
    collect: Callable[[VerifyTarget, float], str],
    judge: Callable[[Subject, str], Judgement] = holds,
    **of_probe: Any,
) -> Check:
    options = {"seconds": 5.0, **of_probe}
    return Check(id_, Suite.SERVICE, f"title of {id_}", Probe(id_, collect, **options), judge)


def run(*checks: Check) -> dict[str, CheckResult]:
    report = framework.execute(checks, TARGET)
    assert [r.id for r in report.results] == [c.id for c in checks]
    return {r.id: r for r in report.results}


# --- running ---------------------------------------------------------------------------------


def test_each_outcome() -> None:
    def broken(_: Subject, output: str) -> Judgement:
        raise KeyError(output)

    found = run(
        check("A1", saying("yes")),
        check("A2", saying("no")),
        check("A3", failing(RavectlError("no way in", "open one", details="a\nlast words"))),
        check("A4", failing(ConnectionResetError(104, "Connection reset by peer"))),
        check("A5", failing(ValueError(f"Authorization: {TARGET.ingress_password}"))),
        check("A6", saying(TARGET.router_key), broken),
        check("A7", saying("?"), lambda _s, _o: framework.unreadable("a yes", "a riddle")),
    )
    assert [r.outcome for r in found.values()] == [
        Outcome.PASSED, Outcome.FAILED, *[Outcome.ERROR] * 5
    ]  # fmt: skip
    assert (found["A2"].seen, found["A2"].remedy) == ("no", "make it say yes")
    assert found["A1"].remedy == ""
    assert found["A3"].seen == "no way in: last words"
    assert "reset by peer" in found["A4"].seen
    assert "ValueError" in found["A5"].seen
    assert "KeyError" in found["A6"].seen
    assert "a riddle" in found["A7"].seen
    assert all(r.remedy for r in found.values() if r.outcome is not Outcome.PASSED)
    # what an exception quotes may be a secret
    assert TARGET.ingress_password not in repr(found)
    assert TARGET.router_key not in repr(found)


def test_checks_share_a_probe_that_runs_once() -> None:
    calls = []

    def collect(_target: VerifyTarget, _deadline: float) -> str:
        calls.append(1)
        return "yes"

    shared = Probe("shared", collect, 5.0)
    checks = [Check(f"A{n}", Suite.HTTP, "", shared, holds) for n in range(3)]
    assert all(r.outcome is Outcome.PASSED for r in run(*checks).values())
    assert len(calls) == 1


def test_a_probe_that_hangs_is_an_error_and_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(framework, "GRACE_SECONDS", 0.1)
    release = threading.Event()

    def hang(_target: VerifyTarget, _deadline: float) -> str:
        release.wait(30)
        return "yes"

    try:
        found = run(check("A1", hang, seconds=0.2), check("A2", saying("yes"), seconds=0.2))
    finally:
        release.set()
    assert found["A1"].outcome is Outcome.ERROR
    assert "did not end" in found["A1"].seen
    assert found["A2"].outcome is Outcome.PASSED


def test_what_measures_time_runs_alone() -> None:
    busy: list[str] = []
    beside: dict[str, list[str]] = {}

    def collect(name: str) -> Callable[[VerifyTarget, float], str]:
        def body(_target: VerifyTarget, _deadline: float) -> str:
            beside[name] = list(busy)
            busy.append(name)
            time.sleep(0.05)
            busy.remove(name)
            return "yes"

        return body

    run(
        check("A1", collect("A1"), alone=True),
        check("A2", collect("A2")),
        check("A3", collect("A3")),
        check("A4", collect("A4"), alone=True),
    )
    assert beside["A1"] == beside["A4"] == []


def test_what_disturbs_runs_beside_nothing() -> None:
    disruptive = [c for c in verify.CHECKS if c.disruptive]
    assert disruptive
    assert [c.id for c in disruptive if not c.probe.alone] == []


def test_a_result_is_told_when_it_comes() -> None:
    seen: list[str] = []
    framework.execute([check("A1", saying("yes"))], TARGET, lambda r: seen.append(r.id))
    assert seen == ["A1"]


def test_calls_at_once_keep_their_order_and_raise() -> None:
    assert framework.at_once([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]

    def fail() -> int:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        framework.at_once([lambda: 1, fail])


def test_what_a_guest_says_cannot_draw_on_the_terminal() -> None:
    shown = framework.clean("a\x1b[2Jb\r\n\tc\u202ed\x00 " + "x" * 5000)
    assert shown.startswith("a\ufffd[2Jb c\ufffdd\ufffd x")
    assert len(shown) == framework.MAX_TEXT


def test_many_faults_are_counted() -> None:
    found = judged("none", "", [f"fault {n}" for n in range(20)], "mend")
    assert "fault 7; and 12 more" in found.seen


# --- choosing --------------------------------------------------------------------------------


def test_choice() -> None:
    assert [c.id for c in verify.select()] == [c.id for c in verify.CHECKS if not c.disruptive]
    assert {c.suite for c in verify.select({Suite.HTTP})} == {Suite.HTTP}
    assert [c.id for c in verify.select(ids={"s1", "H3"})] == ["S1", "H3"]
    with pytest.raises(UsageError, match="no check 'Z9'"):
        verify.select(ids={"Z9"})
    with pytest.raises(UsageError, match="no check is both"):
        verify.select({Suite.HTTP}, {"S1"})


def test_ids_are_unique_and_documented() -> None:
    ids = [c.id for c in verify.CHECKS]
    assert len(ids) == len(set(ids))
    text = (Path(__file__).resolve().parents[2] / "docs" / "verify.md").read_text()
    assert [i for i in ids if f"| {i} |" not in text] == []


def test_the_documentation_and_explain_say_the_same() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "verify.md"
    rows = {
        cells[1].strip(): cells[3].strip()
        for line in page.read_text().splitlines()
        if len(cells := line.split("|")) == 5 and cells[1].strip()[1:].isdigit()
    }
    assert rows == {i: e.promise for i, e in EXPLANATIONS.items()}
    assert set(EXPLANATIONS) == {c.id for c in verify.CHECKS}


@pytest.mark.parametrize("check", verify.CHECKS, ids=lambda c: c.id)
def test_each_check_is_explained(check: Check) -> None:
    said = verify.explain(check.id.lower())
    assert said.startswith(f"{check.id}: {check.title} (suite {check.suite.value}, ")
    assert ("not disruptive" in said) is not check.disruptive
    e = EXPLANATIONS[check.id]
    assert all(part in said for part in (e.threat, e.probe, e.failing, e.action))


def test_what_does_not_exist_is_not_explained() -> None:
    with pytest.raises(UsageError, match="no check 'Z9'"):
        verify.explain("Z9")


# --- reporting -------------------------------------------------------------------------------


def report(*, broken: bool = True) -> Report:
    found = [
        CheckResult(
            id="S1", suite=Suite.SERVICE, title="it runs", outcome=Outcome.PASSED,
            expected="running", seen="running", remedy="", seconds=0.25,
        )
    ]  # fmt: skip
    if broken:
        bad = dataclasses.replace(
            found[0], id="H1", suite=Suite.HTTP, title="a | b <c>", outcome=Outcome.FAILED,
            seen="502 & \x00 *no*", remedy="look",
        )  # fmt: skip
        found += [bad, dataclasses.replace(bad, id="H2", outcome=Outcome.ERROR, seen="silence")]
    return Report(
        instance="default", profile="safe", image="0123456789abcdef", results=tuple(found),
        seconds=1.5, started="2026-11-25T08:00:00Z", not_checked=("O3",),
    )  # fmt: skip


def test_json() -> None:
    tree = json.loads(verify.render(report(), "json"))
    assert tree["holds"] is False
    assert [(r["id"], r["outcome"]) for r in tree["results"]] == [
        ("S1", "passed"), ("H1", "failed"), ("H2", "error")
    ]  # fmt: skip
    assert json.loads(verify.render(report(broken=False), "json"))["holds"] is True


def test_json_keeps_to_its_schema() -> None:
    validator = jsonschema_rs.Draft202012Validator(json.loads(verify.schema()))
    for one in (
        report(),
        report(broken=False),
        framework.execute([check("A1", saying("no"))], TARGET),
    ):
        validator.validate(json.loads(verify.render(one, "json")))


@pytest.mark.parametrize("where", ["report", "result"])
def test_the_schema_has_exactly_the_fields_of_the_model(where: str) -> None:
    tree = json.loads(verify.schema())
    kind, own = (Report, {"holds"}) if where == "report" else (CheckResult, set())
    part = tree if where == "report" else tree["$defs"]["result"]
    names = {f.name for f in dataclasses.fields(kind)} | own
    assert set(part["properties"]) == set(part["required"]) == names


def test_the_schema_refuses_drift() -> None:
    validator = jsonschema_rs.Draft202012Validator(json.loads(verify.schema()))
    good = json.loads(verify.render(report(), "json"))
    for change in ({"more": 1}, {"results": []}, {"started": "today"}, {"holds": "yes"}):
        assert not validator.is_valid(good | change)
    assert [v for v in good if validator.is_valid({k: good[k] for k in good if k != v})] == []
    suites = json.loads(verify.schema())["$defs"]["result"]["properties"]
    assert suites["suite"]["enum"] == [s.value for s in Suite]
    assert set(suites["outcome"]["enum"]) == {o.value for o in Outcome}


def test_only_changes_are_told() -> None:
    first, *_ = report(broken=False).results

    def of(*results: CheckResult) -> Report:
        return dataclasses.replace(report(), results=results)

    slower = dataclasses.replace(first, seen="running, 2 s", seconds=2.0)
    bad = dataclasses.replace(first, outcome=Outcome.FAILED, seen="down", remedy="start it")
    worse = dataclasses.replace(bad, seen="gone")
    assert verify.changes(None, of(first)) == (first,)
    assert verify.changes(of(first), of(slower)) == ()
    for before, now in ((first, bad), (bad, worse), (bad, first)):
        assert verify.changes(of(before), of(now)) == (now,)
    assert verify.changes(of(bad), of(bad)) == ()
    said = verify.lines((bad,), "2026-11-25T08:00:00Z")
    assert "FAILED" in said[0]
    assert any("start it" in x for x in said)


def test_what_was_not_chosen_is_named() -> None:
    text = verify.render(report(), "markdown")
    for part in ("image: 0123456789abcdef", "2026-11-25T08:00:00Z", "not checked: O3"):
        assert part in text


def test_junit() -> None:
    root = ET.fromstring(verify.render(report(), "junit"))
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("3", "1", "1")
    suites = {s.get("name"): s for s in root.iter("testsuite")}
    assert set(suites) == {"service", "http"}
    (failure,) = suites["http"].iter("failure")
    assert failure.get("message") == "502 & \ufffd *no*"
    assert "fix:" in (failure.text or "")
    assert [e.get("message") for e in suites["http"].iter("error")] == ["silence"]


# the elements, children in order, and attributes of the JUnit schema that Jenkins publishes
JUNIT = {
    "testsuites": (("testsuite",), {"name", "time", "tests", "failures", "errors", "disabled"}),
    "testsuite": (
        ("properties", "testcase", "system-out", "system-err"),
        {"name", "tests", "failures", "errors", "time", "timestamp", "hostname", "skipped", "id"},
    ),
    "properties": (("property",), {}),
    "property": ((), {"name", "value"}),
    "testcase": (("error", "failure", "system-out"), {"name", "classname", "time"}),
    "failure": ((), {"type", "message"}),
    "error": ((), {"type", "message"}),
    "system-out": ((), set()),
}


def test_junit_has_the_usual_form() -> None:
    for node in ET.fromstring(verify.render(report(), "junit")).iter():
        children, attributes = JUNIT[node.tag]
        places = [children.index(child.tag) for child in node]
        assert places == sorted(places)
        assert set(node.attrib) <= set(attributes)
        if node.tag == "testsuite":
            assert {"name", "tests", "timestamp"} <= set(node.attrib)
            assert re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}", node.attrib["timestamp"])


def test_markdown() -> None:
    text = verify.render(report(), "markdown")
    (row,) = [x for x in text.splitlines() if x.startswith("| H1 ")]
    assert row.replace("\\|", "").count("|") == 6  # what was seen opens no column
    assert r"a \| b \<c\>" in row
    assert "- fix: look" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_table(terminal: bool) -> None:
    text = verify.render(report(), "table", terminal=terminal)
    assert ("\x1b[" in text) is terminal
    for part in ("FAILED", "ERROR", "expected", "look", "1 of 3 checks hold", "1 failed"):
        assert part in text
    assert "0123456789ab" in text


def test_summary() -> None:
    assert verify.summary(report()) == ("1 of 3 checks hold, 1 failed, 1 could not be run (1.5 s)")
    assert verify.summary(report(broken=False)) == "1 of 1 checks hold (1.5 s)"


STRICT = "default-src 'none'; script-src 'self'; base-uri 'none'"


@pytest.mark.parametrize(
    ("page", "policy", "good"),
    [
        ("localhost/, signed in", STRICT, True),
        ("localhost/, signed in", STRICT.replace("'none'", "'self'", 1), False),
        ("localhost/, signed in", STRICT.replace("'self'", "'self' 'unsafe-inline'"), False),
        ("localhost/, no credentials", STRICT.replace("'self'", "https://*"), False),
        ("localhost/, no credentials", "", False),
        ("kanban.localhost/, signed in", "script-src 'unsafe-inline'", True),  # not ours to say
    ],
)
def test_the_consoles_policy(page: str, policy: str, good: bool) -> None:
    row = {"page": page, "headers": {"Content-Security-Policy": policy}}
    assert (console_faults(row) == []) is good
    assert console_faults({"page": "localhost/, signed in"}) != []


def test_only_the_alert_of_the_stopped_service_counts_and_only_after_the_stop() -> None:
    def event(service: str, at: str, name: str = "ServiceDown") -> dict[str, object]:
        labels = {"alertname": name, "service": service}
        return {"timestamp": at, "payload": {"alerts": [{"labels": labels}]}}

    def seen(*events: dict[str, object]) -> float | None:
        return alerting.arrived(json.dumps({"items": events}).encode(), 1795575600.0)

    late, early = "2026-11-25T03:00:20+00:00", "2026-11-25T02:59:50Z"
    assert seen(event("kanban", late)) == 1795575620.0
    assert seen(event("kanban", early)) is None
    assert seen(event("router", late)) is None
    assert seen(event("kanban", late, "OomKill")) is None
    assert seen({"timestamp": late, "payload": []}, event("kanban", late)) == 1795575620.0
    assert alerting.arrived(b"<html>", 0.0) is None
