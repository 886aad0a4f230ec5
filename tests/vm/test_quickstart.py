"""The first of the README's two commands, as a new user types it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from ravectl.verify import CHECKS
from tests.conftest import Tool

pytestmark = pytest.mark.vm

TOP = Path(__file__).resolve().parents[2]


def test_quickstart_leaves_a_verified_machine(tool: Tool) -> None:
    done = subprocess.run(
        [TOP / "scripts" / "quickstart"],
        env={**os.environ, "RAVECTL_WORKSPACE": str(tool.workspace)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(not c.disruptive for c in CHECKS)
    assert re.search(rf"^{count} of {count} checks hold", done.stdout, re.M)
    assert tool.status()["state"] == "running"
    for line in ("console page   https://localhost:", "shell          ravectl ssh",
                 "stop           ravectl down"):  # fmt: skip
        assert line in done.stdout
    secret = tool.secret("ingress/password")
    assert len(secret) > 12
    assert secret not in done.stdout + done.stderr
    tool("down")
