"""Only a guest that computed the right thing counts; whatever else happens is a verdict too."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from ravectl import command, kvm
from ravectl.kvm import GuestExit, Verdict

GOOD = GuestExit(kvm.EXIT_HLT, 0, kvm.EXPECTED)
PROBE = [sys.executable, "-P", "-m", "ravectl.kvm"]


def prints(text: str) -> list[str]:
    return [sys.executable, "-c", f"print({text!r})"]


# --- the judgement ---------------------------------------------------------------------------


def test_a_halt_after_the_right_results_is_the_only_success() -> None:
    assert kvm.judge("/dev/kvm", GOOD) == Verdict(True, "/dev/kvm runs guests")


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (GuestExit(kvm.EXIT_INTERNAL_ERROR, 1, (0, 0)), "KVM_EXIT_INTERNAL_ERROR, suberror 1"),
        (GuestExit(kvm.EXIT_INTERNAL_ERROR, 1, kvm.EXPECTED), "KVM_EXIT_INTERNAL_ERROR"),
        (GuestExit(kvm.EXIT_FAIL_ENTRY, 0x80000021, (0, 0)), "hardware reason 0x80000021"),
        (GuestExit(kvm.EXIT_SHUTDOWN, 0, (0, 0)), "KVM_EXIT_SHUTDOWN"),
        (GuestExit(kvm.EXIT_HLT, 0, (1, 0)), "KVM_EXIT_HLT, but it computed 1 and 0"),
        (GuestExit(kvm.EXIT_HLT, 0, (0, 0)), "it computed 0 and 0"),
        (GuestExit(99, 0, kvm.EXPECTED), "KVM_EXIT_99"),
    ],
)
def test_every_other_end_is_told(end: GuestExit, told: str) -> None:
    verdict = kvm.judge("/dev/kvm", end)
    assert not verdict.works
    assert told in verdict.reason
    assert "/dev/kvm" in verdict.reason
    assert verdict.remedy


@pytest.mark.parametrize(
    ("code", "reason", "remedy"),
    [
        (errno.EACCES, "no right to open D", "usermod"),
        (errno.EPERM, "this container may not open D", "--device D"),
        (errno.ENOENT, "no D", "modprobe"),
        (errno.ENODEV, "no D", "modprobe"),
        (errno.ENOTTY, "D is not a KVM device", "TCG"),
        (errno.ENOMEM, "cannot allocate memory", "TCG"),
    ],
)
def test_a_failed_call_names_its_remedy(code: int, reason: str, remedy: str) -> None:
    verdict = kvm.judge_error("D", code)
    assert not verdict.works
    assert reason in verdict.reason
    assert remedy in verdict.remedy
    assert "\n" not in verdict.reason + verdict.remedy


# --- the process that is asked ---------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [Verdict(True, "yes"), Verdict(False, "no", "do this")], ids=["works", "not"]
)
def test_what_the_process_says_is_taken(said: Verdict) -> None:
    assert kvm._ask(prints(json.dumps(asdict(said))), 20) == said


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "[]", "7", "null", '"x"', "{}", '{"works": true}',
     '{"works": "yes", "reason": "r", "remedy": ""}',
     '{"works": true, "reason": "r", "remedy": "", "more": 1}', '{"works": true, "reason": "r"'],
)  # fmt: skip
def test_what_is_no_verdict_is_not_taken(text: str) -> None:
    verdict = kvm._ask(prints(text), 20)
    assert not verdict.works
    assert "the KVM probe failed" in verdict.reason


def test_a_guest_that_hangs_is_given_up() -> None:
    verdict = kvm._ask(["sleep", "infinity"], 1)
    assert not verdict.works
    assert "did not end within 1 s" in verdict.reason


def test_a_crash_stays_in_the_process() -> None:
    code = "import os, signal; print('{}', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    verdict = kvm._ask([sys.executable, "-c", code], 20)
    assert not verdict.works
    assert "was ended by signal 11" in verdict.reason


def test_a_verdict_of_a_process_that_failed_is_not_taken() -> None:
    good = json.dumps(asdict(Verdict(True, "yes")))
    code = f"import sys; print({good!r}); sys.exit('out of luck')"
    verdict = kvm._ask([sys.executable, "-c", code], 20)
    assert verdict == Verdict(False, "the KVM probe failed: out of luck", kvm.TCG_REMEDY)


def test_a_missing_program_is_a_verdict() -> None:
    verdict = kvm._ask(["no-such-program"], 5)
    assert not verdict.works
    assert "no-such-program" in verdict.reason


# --- devices, for real -----------------------------------------------------------------------


def test_a_plain_file_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setenv("RAVECTL_KVM_DEVICE", str(device))
    assert kvm.probe(30) == kvm.judge_error(str(device), errno.ENOTTY)


def test_a_missing_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "none"
    monkeypatch.setenv("RAVECTL_KVM_DEVICE", str(device))
    assert kvm.probe(30) == kvm.judge_error(str(device), errno.ENOENT)


def test_a_device_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.touch(0o000)
    monkeypatch.setenv("RAVECTL_KVM_DEVICE", str(device))
    # root reads everything, unless it lacks the capability to
    drop = ["setpriv", "--bounding-set", "-all", "--"] if os.geteuid() == 0 else []
    assert kvm._ask([*drop, *PROBE], 30) == kvm.judge_error(str(device), errno.EACCES)


def test_files_where_the_person_stands_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAVECTL_KVM_DEVICE", str(tmp_path / "none"))
    assert kvm.probe(30).reason == f"no {tmp_path / 'none'}"


def test_the_real_device_gets_a_verdict_and_a_reason() -> None:
    verdict = kvm.probe(30)
    assert verdict.reason
    assert verdict.works or verdict.remedy


def test_instructions_that_are_only_emulated_prove_nothing() -> None:
    """A guest that halts at once never passes, whatever this host's KVM is like."""
    if not os.access(kvm.DEVICE, os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm here")
    code = (
        "from ravectl import kvm\nprint(kvm.judge('D', kvm.run_guest(kvm.DEVICE, kvm.HLT)).works)"
    )
    result = command.run([sys.executable, "-c", code], timeout=30, check=False)
    assert result.stdout.strip() != "True"
