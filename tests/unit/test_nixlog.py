"""What Nix says becomes progress and errors. The logs are those of real builds (Nix 2.8), with
paths made shorter and repeated lines left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ravectl.engines import nixlog
from ravectl.engines.nixlog import Log

RECORDED = Path(__file__).parent / "recorded" / "nix"


def lines(name: str) -> list[str]:
    return (RECORDED / f"{name}.log").read_text().splitlines()


def read(name: str) -> tuple[Log, list[str]]:
    """The log at its end, and every status that it had."""
    log, said = Log(), [""]
    for line in lines(name):
        log.feed(line)
        if log.status() != said[-1]:
            said.append(log.status())
    return log, said[1:]


def test_a_build() -> None:
    log, said = read("built")
    assert (log.built.done, log.built.expected) == (22, 22)
    assert log.errors == []
    assert "built 7 of 22, linux" in said
    assert said[-1] == "built 22 of 22"


def test_a_download() -> None:
    log, said = read("substituted")
    assert (log.fetched.done, log.fetched.expected) == (17, 17)
    assert log.downloaded.done == log.downloaded.expected == 27462
    assert any("fetched 8 of 17 (0 of 0 MB), roles" in s for s in said)


def test_a_failed_derivation_is_named_with_its_last_lines() -> None:
    log, _ = read("failed")
    assert [a.name for a in log.failed] == ["bad"]
    tail = log.tail().splitlines()
    assert tail[-1] == "oh no"
    assert tail[-2] == "line 20"
    assert len(tail) == nixlog.TAIL_LINES
    assert log.errors[0].endswith("failed with exit code 7")


def test_a_failure_may_be_told_after_the_end() -> None:
    """As Nix 2.31 does, in other words."""
    log = Log()
    drv = f"/nix/store/{'a' * 32}-rust-1.0.drv"
    for event in (
        {"action": "start", "id": 1, "type": nixlog.BUILD, "fields": [drv, "", 1, 1]},
        {"action": "result", "id": 1, "type": nixlog.BUILD_LOG_LINE, "fields": ["no space"]},
        {"action": "stop", "id": 1},
        {"action": "msg", "level": 0, "msg": f"error: Cannot build '{drv}'.\n  Reason: it failed"},
    ):
        log.feed(nixlog.PREFIX + json.dumps(event))
    assert [a.name for a in log.failed] == ["rust-1.0"]
    assert log.tail() == "no space"


def test_an_evaluation_that_failed() -> None:
    log, said = read("not-evaluated")
    assert log.errors == ["no such thing"]
    assert log.failed == []
    assert said == []


def test_the_cause_is_told_and_not_the_trace_before_it() -> None:
    """Nix 2.26 writes the trace first, and the cause apart as raw_msg."""
    log = Log()
    trace = "error:\n       … while calling 'throw'\n\n       error: no kernel today"
    event = {"action": "msg", "level": 0, "raw_msg": "no kernel today", "msg": trace}
    log.feed(nixlog.PREFIX + json.dumps(event))
    log.feed(nixlog.PREFIX + json.dumps({"action": "msg", "level": 0, "msg": "error: "}))
    assert log.errors[0] == "no kernel today"
    log.failed.clear()
    assert log.tail() == ""


def test_the_derivation_that_failed_is_the_one_that_is_named() -> None:
    """Not another, whose name is the end of its name."""
    log = Log()
    paths = [f"/nix/store/{c * 32}-{n}.drv" for c, n in (("a", "image"), ("b", "vm-image"))]
    for number, path in enumerate(paths):
        start = {"action": "start", "id": number, "type": nixlog.BUILD, "fields": [path, "", 1, 1]}
        log.feed(nixlog.PREFIX + json.dumps(start))
    said = {"action": "msg", "level": 0, "msg": f"error: builder for '{paths[1]}' failed"}
    log.feed(nixlog.PREFIX + json.dumps(said))
    assert [a.name for a in log.failed] == ["vm-image"]


def test_a_cache_that_does_not_answer() -> None:
    log, _ = read("unreachable")
    assert any("unable to download" in w for w in log.warnings)


def test_a_phase_is_shown() -> None:
    log = Log()
    start = {"action": "start", "id": 1, "type": nixlog.BUILD, "fields": [
        f"/nix/store/{'a' * 32}-rust-1.0.drv", "", 1, 1]}  # fmt: skip
    phase = {"action": "result", "id": 1, "type": nixlog.SET_PHASE, "fields": ["buildPhase"]}
    for event in (start, phase):
        log.feed(nixlog.PREFIX + json.dumps(event))
    assert log.status() == "rust-1.0 (buildPhase)"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"/nix/store/{'0' * 32}-linux-6.12.drv", "linux-6.12"),
        (f"/elsewhere/store/{'z' * 32}-a-b", "a-b"),
        ("", ""),
    ],
)
def test_names(path: str, name: str) -> None:
    assert nixlog.derivation_name(path) == name


def test_what_is_not_of_the_format_is_kept_for_the_error() -> None:
    log = Log()
    log.feed("\x1b[31;1merror:\x1b[0m cannot open the database")
    assert log.tail() == "error: cannot open the database"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
EVENTS = st.fixed_dictionaries(
    {},
    optional={
        "action": st.sampled_from(["start", "stop", "result", "msg"]) | ANY,
        "id": st.integers(1, 3) | ANY,
        "type": st.sampled_from([101, 102, 103, 104, 105, 106, 108]) | ANY,
        "fields": st.lists(st.integers() | st.text(max_size=5), max_size=4) | ANY,
        "level": st.integers(0, 2) | ANY,
        "msg": ANY,
    },
)


@given(events=st.lists(EVENTS | ANY, max_size=12), torn=st.integers(0, 40))
def test_whatever_a_newer_nix_says_is_survived(events: list[object], torn: int) -> None:
    log = Log()
    for event in events:
        text = nixlog.PREFIX + json.dumps(event)
        log.feed(text)
        log.feed(text[:torn])
        assert "\n" not in log.status()
