"""Commands end when they should, and take their children with them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ravectl import command, console
from ravectl.errors import DeadlineError, HostError, RavectlError


def runs(pid: str, seconds: float = 5.0) -> bool:
    """Whether a process still runs after `seconds`; a zombie that waits for init does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


def test_output_and_input() -> None:
    result = command.run(["cat"], stdin=b"x" * 1_000_000)
    assert len(result.stdout) == 1_000_000


def test_failure_quotes_the_command_and_blanks_secrets() -> None:
    with pytest.raises(RavectlError) as caught:
        command.run(["sh", "-c", "echo no hunter2 here >&2; exit 3"], redact=["hunter2"])
    error = caught.value
    assert "exit 3" in error.message
    assert "no [redacted] here" in error.details
    assert "hunter2" not in error.message + error.hint + error.details


def test_a_command_is_said_to_those_who_ask(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command.run(["true", "quiet"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "_verbose", True)
    url = "https://ada:pass@mirror.test/d"  # pragma: allowlist secret
    command.run(["true", "two\nlines", "hunter2", url], redact=["hunter2"])
    told = capsys.readouterr().err
    assert told == "run: true 'two\\nlines' [redacted] https://[redacted]@mirror.test/d\n"


def test_missing_program_is_the_hosts_fault() -> None:
    with pytest.raises(HostError, match="no-such-tool is not installed"):
        command.run(["no-such-tool"])


def test_deadline_ends_the_whole_group(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    with pytest.raises(DeadlineError):
        command.run(["sh", "-c", f"sleep 300 & echo $! > {mark}; wait"], timeout=1)
    assert not runs(mark.read_text().strip())


def test_lines_arrive_while_it_runs() -> None:
    seen: list[float] = []
    command.run(
        ["sh", "-c", "echo a >&2; sleep 0.5; echo b >&2"],
        on_line=lambda _: seen.append(time.monotonic()),
    )
    assert len(seen) == 2
    assert seen[1] - seen[0] > 0.3


def test_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = (
        f"from ravectl import command; command.run(['sh','-c','echo $$ > {mark}; exec sleep 300'])"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 10
    while not (mark.exists() and mark.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = mark.read_text().strip()
    assert runs(child, seconds=0.2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not runs(child)
