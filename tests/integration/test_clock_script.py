"""rave-clock: when it sets the clock, by an RTC that is a file and a `date` that only says so."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from ravectl import images
from tests.plans import PLAN


@pytest.mark.parametrize(("off", "sets"), [(0, False), (2, False), (3600, True), (-60, True)])
def test_it_sets_a_clock_that_is_off(tmp_path: Path, off: int, sets: bool) -> None:
    script, said = tmp_path / "clock", tmp_path / "said"
    script.write_text(images.render_debian(PLAN).file("usr/lib/rave/clock").content)
    (tmp_path / "date").write_text(f'#!/bin/sh\necho "$@" >{said}\n')
    (tmp_path / "date").chmod(0o755)
    rtc = tmp_path / "since_epoch"
    rtc.write_text(f"{int(time.time()) + off}\n")
    done = subprocess.run(
        ["bash", script, rtc, "once"], capture_output=True, text=True, timeout=120, check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert said.exists() == sets
    if sets:
        assert said.read_text().strip() == f"-u -s @{rtc.read_text().strip()}"
        assert "behind the host's: set" in done.stdout
