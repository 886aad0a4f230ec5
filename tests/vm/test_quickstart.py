"""The first of the README's two commands, as a new user types it."""

from __future__ import annotations

import re

import pytest

from ravectl.verify import CHECKS
from tests.conftest import Tool

pytestmark = pytest.mark.vm


def test_quickstart_leaves_a_verified_machine(machine: Tool) -> None:
    done = machine.started
    assert done is not None
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(not c.disruptive for c in CHECKS)
    assert re.search(rf"^{count} of {count} checks hold", done.stdout, re.M)
    assert machine.status()["state"] == "running"
    for line in ("console page   https://localhost:", "shell          ravectl ssh",
                 "stop           ravectl down"):  # fmt: skip
        assert line in done.stdout
    secret = machine.secret("ingress/password")
    assert len(secret) > 12
    assert secret not in done.stdout + done.stderr
