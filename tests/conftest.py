"""A real machine, booted once for all tests that only use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from ravectl import files, instance

# how long an example takes says more of what else runs on this host than of what is tested
settings.register_profile("rave", deadline=None)
settings.load_profile("rave")


TOP = Path(__file__).resolve().parent.parent

# Files whose tests take long and share nothing: they need not run one after the other.
SPREAD = {"test_build.py", "test_nix_build.py", "test_rotation_states.py", "test_secrets_cli.py"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each file to one worker; and no second machine beside the one that tests share.

    Two machines on two processors make one another miss their deadlines.
    """
    for item in items:
        if item.path.name not in SPREAD:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    if item.path.name == "test_quickstart.py":
        return 1  # it tells of the start, before others change what was started
    return 2 if "machine" in getattr(item, "fixturenames", ()) else 0


@dataclass
class Tool:
    """ravectl in a workspace, as a person runs it."""

    workspace: Path
    cache: Path | None = None
    started: subprocess.CompletedProcess[str] | None = None  # what quickstart said

    @property
    def environment(self) -> dict[str, str]:
        # tests of the nix engine say so
        own = {"RAVECTL_WORKSPACE": str(self.workspace), "RAVECTL_ENGINE": "debian"}
        if self.cache:
            own["RAVECTL_CACHE_DIR"] = str(self.cache)
        return {**os.environ, **own}

    def __call__(
        self,
        *words: str,
        code: int | None = 0,
        stdin: str = "",
        seconds: float = 900,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "ravectl", *words],
            env={**self.environment, **(env or {})}, input=stdin, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
        if code is not None:
            assert done.returncode == code, (
                f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ravectl", *words],
            env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def quickstart(self) -> None:
        """The first of the README's two commands: a machine that is up and verified."""
        self.started = subprocess.run(
            [TOP / "scripts" / "quickstart"], env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=800, check=False,
        )  # fmt: skip
        # 3: a check did not hold, which test_quickstart.py tells; the machine is there
        assert self.started.returncode in (0, 3), self.started.stdout + self.started.stderr

    def instance(self, name: str = "default") -> instance.Instance:
        return instance.Instance(self.workspace / ".rave" / "instances" / name, name)

    def secret(self, name: str) -> str:
        return self("secrets", "get", name).stdout.rstrip("\n")

    def pid(self, name: str = "default") -> int | None:
        process = self.instance(name).process()
        return process.pid if process else None

    def status(self, name: str = "default") -> dict[str, Any]:
        rows = json.loads(self("status", "--json", "--name", name).stdout)
        assert len(rows) == 1
        return dict(rows[0])

    def wait_for_qemu(self, name: str = "default", seconds: float = 120) -> int:
        """Wait until its QEMU runs; its pid."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if pid := self.pid(name):
                return pid
            time.sleep(0.1)
        raise AssertionError("no QEMU was started")

    def wait_for_no_qemu(self, name: str = "default", seconds: float = 15) -> None:
        end = time.monotonic() + seconds
        while self.pid(name):
            assert time.monotonic() < end, "QEMU was left running"
            time.sleep(0.1)

    def end(self) -> None:
        """Leave nothing running, however the test went."""
        for found in instance.list_instances(self.workspace / ".rave" / "instances"):
            if process := found.process():
                os.kill(process.pid, signal.SIGKILL)
        for root in (self.cache or files.cache_dir()).glob("roots/*"):  # or gc keeps its image
            if root.is_symlink() and root.readlink().is_relative_to(self.workspace):
                root.unlink()


@pytest.fixture(autouse=True, scope="session")
def usual_signals() -> None:
    """What ignores signals for itself (nohup, a shell's `&`) does so for all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def own_age_key(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees or changes the age keys of whoever runs it."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))
    for name in ("SOPS_AGE_KEY", "SOPS_AGE_KEY_FILE"):
        os.environ.pop(name, None)


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[Tool]:
    """ravectl in an empty workspace; images come from the common cache."""
    made = Tool(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tool]:
    """A running SAFE machine in an empty workspace, made as the README tells a new user to."""
    made = Tool(tmp_path_factory.mktemp("machine"))
    try:
        made.quickstart()
        yield made
    finally:
        made.end()
