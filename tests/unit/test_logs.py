"""The journal across lost connections, and events between two looks: nothing twice, no gap."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ravectl import feed, logs
from ravectl.errors import UsageError
from ravectl.model import EngineName
from tests.plans import PLAN


def entry(number: int) -> str:
    return json.dumps({"__CURSOR": f"c{number}", "MESSAGE": str(number)})


def journalctl(total: int, query: logs.Query, after: str | None) -> list[str]:
    """What the machine prints for a command, as journalctl(1) has it."""
    words = shlex.split(logs.command(query, after))
    start = max(total - (query.lines or 0), 0)
    cursor = next((w for w in words if w.startswith("--after-cursor=")), None)
    if cursor is not None:
        assert "--no-tail" in words
        start = int(cursor.removeprefix("--after-cursor=c")) + 1
    first = [] if cursor or not total else [f"-- cursor: c{total - 1}"]
    return first + [entry(n) for n in range(start, total)]


@settings(deadline=None)
@given(
    at_start=st.integers(0, 20), lines=st.integers(0, 5),
    breaks=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=8),
)  # fmt: skip
def test_each_entry_is_shown_once_however_the_connection_breaks(
    at_start: int, lines: int, breaks: list[tuple[int, int]]
) -> None:
    at_start += 1  # a journal is never empty: the kernel wrote to it
    shown: list[str] = []
    query = logs.Query(lines=lines, follow=True, as_json=True)
    reader = logs.Reader(query, shown.append)
    total = at_start
    for more, whole_lines in [*breaks, (0, 10**6)]:
        # the first line always comes: it is printed before journalctl follows
        for line in journalctl(total, query, reader.cursor)[: max(whole_lines, 1)]:
            reader.take(line)
        total += more
    for line in journalctl(total, query, reader.cursor):
        reader.take(line)
    # the tail may be cut by a break in it; from the first line that was shown on, all is there
    numbers = [int(json.loads(line)["MESSAGE"]) for line in shown]
    assert numbers == sorted(set(numbers))
    assert set(range(at_start, total)) <= set(numbers)


def test_journalctl_is_asked_for_what_was_meant() -> None:
    query = logs.Query(
        unit="nginx.service", lines=7, since="-1h", until="now", priority="err", grep="a b"
    )
    words = logs.arguments(query)
    for word in ("--unit=nginx.service", "--lines=7", "--since=-1h", "--until=now",
                 "--priority=err", "--grep=a b"):  # fmt: skip
        assert word in words
    assert "--follow" not in words
    follows = logs.Query(since="today", follow=True)
    again = logs.arguments(follows, "s=1;i=2")
    assert "--after-cursor=s=1;i=2" in again
    assert not [w for w in again if w.startswith("--since")], "journalctl takes one of them"
    assert shlex.split(logs.command(follows, "s=1;i=2"))[0] == "exec", "a cursor is quoted"


def text(**fields: Any) -> str:
    time = {"__REALTIME_TIMESTAMP": "1762336800000000", "_HOSTNAME": "rave-safe"}
    return logs.text_of({**time, **fields})


@pytest.mark.parametrize("level", ["err", "0", "7", "emerg..err", "3..4"])
def test_priorities(level: str) -> None:
    logs.check(logs.Query(priority=level))
    for bad in (f"{level}..", f"{level}x", f"x..{level}", "8"):
        with pytest.raises(UsageError, match="is no priority"):
            logs.check(logs.Query(priority=bad))


def test_an_entry_reads_as_journalctl_prints_it() -> None:
    assert text(SYSLOG_IDENTIFIER="nginx", _PID="7", MESSAGE="up") == (
        "Nov 05 10:00:00 rave-safe nginx[7]: up"
    )
    assert text(_COMM="sh", MESSAGE="one\ntwo\n").splitlines() == [
        "Nov 05 10:00:00 rave-safe sh: one", "                              two",
    ]  # fmt: skip


def test_an_entry_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in text(SYSLOG_IDENTIFIER="a\x1b[2J\n", MESSAGE="b\x1b]0;x\x07\r")
    assert text(SYSLOG_IDENTIFIER="x", MESSAGE=[104, 105, 27, 255]).endswith("x: hi\ufffd\ufffd")
    assert text(SYSLOG_IDENTIFIER=["x", "y"], MESSAGE=None).endswith("x: ")


@settings(deadline=None)
@given(st.recursive(st.none() | st.text() | st.integers() | st.floats(), st.lists, max_leaves=5))
def test_any_field_is_shown(value: Any) -> None:
    assert text(MESSAGE=value, SYSLOG_IDENTIFIER=value, __REALTIME_TIMESTAMP=value)


def test_a_service_of_the_plan_is_its_unit() -> None:
    for engine in EngineName:
        assert logs.planned_unit(PLAN, engine, "ssh") == PLAN.service("ssh").unit[engine]
    assert logs.planned_unit(PLAN, EngineName.DEBIAN, "nginx.service") is None


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("ruoter", "'router'"), ("nginx.servise", "'nginx.service'"), ("systemd-journld", "journald")],
)
def test_an_unknown_unit_suggests_the_nearest(asked: str, nearest: str) -> None:
    known = ["router", "ssh", "nginx.service", "systemd-journald.service"]
    assert nearest in logs.unknown_unit(asked, known).hint
    assert "did you mean" not in logs.unknown_unit("zzz", known).hint


# --- events ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    store=st.integers(0, 50), last=st.integers(1, 20),
    between=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40), st.booleans()), max_size=10),
)  # fmt: skip
def test_each_event_is_shown_once_and_in_order(
    store: int, last: int, between: list[tuple[int, int, bool]]
) -> None:
    def newest_first(low: int, high: int, broken: bool = False) -> Any:
        for n in range(high - 1, low - 1, -1):
            yield {"event_uuid": str(n)}
            if broken and n % 3 == 0:
                raise ConnectionError

    seen, pruned = feed.Feed(), 0
    shown = seen.first([{"event_uuid": str(n)} for n in range(store - 1, -1, -1)][:last])
    total = store
    for came, expired, broken in between:
        total += came
        try:
            shown += seen.new(newest_first(pruned, total, broken))
        except ConnectionError:
            continue
        # retention takes only what was there at a look
        pruned = min(pruned + expired, total)
    shown += seen.new(newest_first(pruned, total))
    expected = [str(n) for n in range(max(store - last, 0), total)]
    assert [row["event_uuid"] for row in shown] == expected
