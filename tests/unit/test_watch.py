"""How a machine does: what the guest's script says is read and shown as it is."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ravectl import watch
from ravectl.cli import watching
from ravectl.errors import RavectlError
from ravectl.model import EngineName
from ravectl.reconnect import Backoff, Lost
from tests.plans import PLAN

DEBIAN = EngineName.DEBIAN
OK = "HTTP/1.0 200 OK\nContent-Type: x\n\n"
ALERTS = {
    "status": "success",
    "data": {
        "alerts": [
            {"labels": {"alertname": "CpuSaturated", "severity": "warning"}, "state": "pending"},
            {
                "labels": {"alertname": "ServiceDown", "severity": "critical"},
                "annotations": {"summary": "router is down\x1b[31m"},
                "state": "firing", "activeAt": "2026-11-05T10:00:00Z",
            },
        ]
    },
}  # fmt: skip
METRICS = "\n".join(
    f'rave_queue_depth{{state="{s}"}} {n}.0'
    for s, n in (("pending", 2), ("running", 1), ("failed", 3), ("unprocessed", 9))
)
TASK = {
    "task_id": "t-1", "status": "running", "agent_type": "ai-engineer",
    "created_at": "2026-11-05T10:00:00.000Z", "outcome": None,
}  # fmt: skip


def answer(
    uptime: float = 100.0, cpu: int = 5_000_000_000, state: str = "active", boot: str = "b",
    prometheus: str = OK + json.dumps(ALERTS), dispatcher: str = OK + METRICS,
    tasks: str = OK + json.dumps({"items": [TASK]}),
) -> str:  # fmt: skip
    units = "\n\n".join(
        f"Id={u}\nActiveState={state}\nStateChangeTimestampMonotonic=40000000\n"
        f"MemoryCurrent=104857600\nMemoryMax=209715200\nCPUUsageNSec={cpu}\nNRestarts=2"
        for u in PLAN.units(DEBIAN)
    )
    return (
        f"== machine ==\nboot={boot}\nuptime={uptime}\nload=0.10 0.20 0.30\nMemTotal=2048000\n"
        f"MemAvailable=1024000\ndisk=4096 1000 250\n== units ==\n{units}\n"
        f"== alerts ==\n{prometheus}\n== metrics ==\n{dispatcher}\n== tasks ==\n{tasks}\n== end =="
    )


def look(**changes: object) -> watch.Look:
    return watch.parse(PLAN, DEBIAN, answer(**changes))  # type: ignore[arg-type]


def test_an_answer_is_read() -> None:
    seen = look()
    assert (seen.uptime_seconds, seen.load) == (100.0, (0.1, 0.2, 0.3))
    assert (seen.memory_bytes, seen.memory_used_bytes) == (2048000 * 1024, 1024000 * 1024)
    assert (seen.disk_bytes, seen.disk_used_bytes) == (4096000, 4096 * 750)
    assert [u.name for u in seen.units] == [s.name for s in PLAN.services]
    unit = seen.units[0]
    assert unit.since_seconds == 60
    assert (unit.memory_bytes, unit.memory_limit_bytes) == (100 << 20, 200 << 20)
    assert (unit.cpu_seconds, unit.cpu_percent, unit.restarts) == (5.0, None, 2)
    assert seen.alerts is not None
    assert [(a.name, a.state) for a in seen.alerts] == [
        ("ServiceDown", "firing"), ("CpuSaturated", "pending"),
    ]  # fmt: skip
    assert seen.tasks == {"pending": 2, "running": 1, "failed": 3}
    assert seen.recent_tasks is not None
    assert seen.recent_tasks[0].outcome == ""


def test_none_and_not_available_are_told_apart() -> None:
    none = look(prometheus=OK + '{"data": {"alerts": []}}', tasks=OK + '{"items": []}')
    assert (none.alerts, none.recent_tasks) == ((), ())
    wrong = ("{", "[]", '{"data": {"alerts": [1]}, "items": [1]}')
    for text in ("", "HTTP/1.0 503 no\n\n{}", *(OK + w for w in wrong)):
        gone = look(prometheus=text, dispatcher=text, tasks=text)
        assert (gone.alerts, gone.tasks, gone.recent_tasks) == (None, None, None), text


def test_cpu_is_what_was_used_between_two_refreshes() -> None:
    first, second = look(), look(uptime=104.0, cpu=7_000_000_000)
    assert {u.cpu_percent for u in watch.since(first, second).units} == {50.0}
    assert {u.cpu_percent for u in watch.since(None, second).units} == {None}
    assert {u.cpu_percent for u in watch.since(first, replace(second, boot_id="c")).units} == {None}
    restarted = look(uptime=104.0, cpu=1)
    assert {u.cpu_percent for u in watch.since(first, restarted).units} == {None}


def test_what_systemd_does_not_know_is_not_a_number() -> None:
    text = answer().replace("104857600", "[not set]").replace("209715200", "infinity")
    unit = watch.parse(PLAN, DEBIAN, text.replace("NRestarts=2", f"NRestarts={2**64 - 1}")).units[0]
    assert (unit.memory_bytes, unit.memory_limit_bytes, unit.restarts) == (None, None, None)


@settings(deadline=None)
@given(st.text(max_size=300) | st.integers(0, 1500).map(lambda n: answer()[n:]))
def test_any_answer_is_read_or_refused(text: str) -> None:
    # refused by RavectlError: anything else would be a defect
    with contextlib.suppress(RavectlError):
        watch.parse(PLAN, DEBIAN, text)


def test_the_script_is_bash_and_asks_for_every_unit() -> None:
    for engine in EngineName:
        text = watch.script(PLAN, engine, 2.0)
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        assert all(unit in text for unit in PLAN.units(engine))
        assert "@" not in text.replace("postgresql@17", "")


# --- shown -------------------------------------------------------------------------------------


def shown(view: watching.View, *, width: int = 80, height: int = 40, later: float = 0.0) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, color_system=None)
    console.print(view.picture(time.monotonic() + later, height))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 132])
def test_the_picture_fits(width: int) -> None:
    view = watching.View("default", "tcg")
    view.show(watch.since(look(), look(uptime=104.0, cpu=7_000_000_000)))
    lines = shown(view, width=width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= 8 + len(PLAN.services)
    text = "\n".join(lines)
    assert "router" in text
    assert "ServiceDown" in text
    assert "2 pending, 1 running, 3 failed" in text
    assert "\x1b" not in text


def test_a_low_terminal_has_fewer_tasks() -> None:
    view = watching.View("default", "tcg")
    view.show(look())
    assert "ai-engineer" in shown(view, height=40)
    assert "ai-engineer" not in shown(view, height=12)


def test_a_lost_connection_says_so_and_counts_down() -> None:
    view = watching.View("default", "tcg")
    assert "connecting" in shown(view)
    view.show(look())
    assert "7 s ago" in shown(view, later=7.2)
    view.lost(Lost("it\x1b[2J broke", 8.0, 0))
    text = shown(view, later=3)
    assert "no connection (it\ufffd[2J broke); next attempt in 5 s" in text
    assert "router" in text, "what was seen last stays"
    view.show(look())
    assert "no connection" not in shown(view)


def test_lines_for_a_log_name_what_is_amiss() -> None:
    assert len(watching.plain(look(prometheus=OK + '{"data": {"alerts": []}}'), "10:00:00")) == 1
    lines = watching.plain(look(state="failed"), "10:00:00")
    assert f"services 0 of {len(PLAN.services)} active  alerts firing: 1" in lines[0]
    assert "10:00:00  router is failed" in lines
    assert any("ServiceDown (critical) router is down" in line for line in lines)
    assert "alerts firing: not available" in watching.plain(look(prometheus=""), "")[0]


def test_an_object_per_refresh_is_json() -> None:
    document = watching.document("default", look())
    assert json.loads(json.dumps(document))["units"][0]["memory_limit_bytes"] == 200 << 20


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.9, "59s"), (61, "1min 1s"), (7260, "2h 1min"), (90000, "1d 1h")],
)
def test_spans(seconds: float | None, text: str) -> None:
    assert watching.span(seconds) == text


def test_attempts_become_rare_and_begin_anew() -> None:
    backoff = Backoff()
    assert [backoff.failed("x").seconds for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    assert backoff.failed("x").attempts == 6
    backoff.worked()
    assert backoff.failed("x") == Lost("x", 1, 0)
