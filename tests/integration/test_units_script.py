"""rave-units: what it says of services, by control groups that look like the kernel's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from ravectl import images
from tests.plans import PLAN

PROCS = "412\n413\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "units"
    path.write_text(images.render_debian(PLAN).file("usr/lib/rave/units").content)
    (tmp_path / "out").mkdir()
    return path


def group(folder: Path, unit: str) -> Path:
    path = folder / "groups" / unit
    path.mkdir(parents=True)
    for name, text in {
        "cgroup.procs": PROCS,
        "memory.stat": "anon 4096000\nfile 99\n",
        "memory.max": "67108864\n",
        "cpu.stat": "usage_usec 12345678\nuser_usec 1\n",
        "pids.current": "7\n",
    }.items():
        (path / name).write_text(text)
    return path


def look(script: Path) -> dict[str, float]:
    folder = script.parent
    subprocess.run(
        ["bash", script, folder / "out", folder / "groups", "once"], check=True, timeout=120
    )
    text = "".join(p.read_text() for p in sorted((folder / "out").glob("*.prom")))
    rows = [re.fullmatch(r"(\S+) +(\S+)", x) for x in text.splitlines() if not x.startswith("#")]
    return {m[1]: float(m[2]) for m in rows if m}


def test_a_unit_that_runs(script: Path) -> None:
    group(script.parent, "nginx.service")
    group(script.parent, "system-postgresql.slice/postgresql@17-main.service")
    seen = look(script)
    assert seen['rave_unit_running{service="ingress"}'] == 1
    assert seen['rave_unit_running{service="postgresql"}'] == 1
    assert seen['rave_unit_running{service="kanban"}'] == 0
    assert seen['rave_unit_memory_bytes{service="ingress"}'] == 4096000
    assert seen['rave_unit_memory_limit_bytes{service="ingress"}'] == 67108864
    assert seen['rave_unit_cpu_seconds_total{service="ingress"}'] == 12.345678
    assert seen['rave_unit_tasks{service="ingress"}'] == 7
    assert seen['rave_unit_starts_total{service="ingress"}'] == 1
    assert {k.partition("{")[2] for k in seen if "{" in k} == {
        f'service="{s.name}"}}' for s in PLAN.services
    }


def test_what_is_missing_or_unlimited_is_zero(script: Path) -> None:
    found = group(script.parent, "nginx.service")
    (found / "memory.max").write_text("max\n")
    (found / "memory.stat").unlink()
    (found / "cgroup.procs").write_text("")
    seen = look(script)
    assert seen['rave_unit_running{service="ingress"}'] == 1
    assert seen['rave_unit_memory_limit_bytes{service="ingress"}'] == 0
    assert seen['rave_unit_memory_bytes{service="ingress"}'] == 0
    assert seen['rave_unit_starts_total{service="ingress"}'] == 0


def test_what_prometheus_reads_is_always_whole(script: Path) -> None:
    """Lines keep their places, so an overlapping reading sees whole numbers."""
    found = group(script.parent, "nginx.service")
    look(script)
    sizes = {p.name: p.stat().st_size for p in (script.parent / "out").glob("*.prom")}
    assert all(size < 4096 for size in sizes.values())  # written at once
    (found / "memory.stat").write_text(f"anon {2**46}\n")
    (found / "cpu.stat").write_text("usage_usec 99999999999999\n")
    look(script)
    assert {p.name: p.stat().st_size for p in (script.parent / "out").glob("*.prom")} == sizes
    for path in (script.parent / "out").glob("*.prom"):
        text = path.read_text()
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert "error while linting" not in done.stderr
        assert "parse error" not in done.stdout + done.stderr


def test_it_starts_nothing(script: Path) -> None:
    group(script.parent, "nginx.service")
    env = {**os.environ, "PATH": "/nonexistent"}
    subprocess.run(
        ["/bin/bash", script, script.parent / "out", script.parent / "groups", "once"],
        check=True, timeout=120, env=env,
    )  # fmt: skip


def test_what_agent_tasks_were_refused(script: Path) -> None:
    assert look(script)["rave_agents_denied_processes_total"] == 0
    slice_ = script.parent / "agents.slice"
    slice_.mkdir()
    (slice_ / "pids.events").write_text("max 1234\n")
    assert look(script)["rave_agents_denied_processes_total"] == 1234
