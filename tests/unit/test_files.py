"""Atomic, locked, swept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ravectl import errors, files, signing, sops, workspace
from ravectl.errors import HostError, RavectlError, UsageError


def test_private_file_is_private_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, "old", files.PRIVATE_FILE)
    files.write_atomic(path, "new", files.PRIVATE_FILE)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_out_replaces_no_device_and_no_link(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    files.write_out(link, "report")
    assert (link.is_symlink(), target.read_text()) == (True, "report")
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        files.write_out(pipe, "report")
        assert reader.communicate(timeout=20)[0] == "report"
    assert pipe.is_fifo()
    with pytest.raises(HostError):
        files.write_out(Path("/dev/full"), "report")
    assert Path("/dev/full").is_char_device()


def test_no_space_for_what_is_printed_is_no_defect() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ravectl", "--version"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: what this prints cannot be written: No space left")
    assert "fix: " in done.stderr
    assert "Exception" not in done.stderr


def test_what_the_system_says_of_a_file_has_a_remedy(tmp_path: Path) -> None:
    full = errors.of_file(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "f")))
    assert full is not None
    assert full.hint.endswith(f"df -h {tmp_path}")
    closed = errors.of_file(PermissionError(errno.EACCES, "Permission denied", str(tmp_path)))
    assert closed is not None
    assert closed.hint == f"ls -ld {tmp_path}"
    ended = FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/5/stat")
    assert errors.of_file(ended) is None, "a defect of ours, which no person mends"


def test_what_nobody_can_look_at_is_not_taken_for_absent(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    with pytest.raises(OSError, match="too long"):
        files.is_there(long)
    (tmp_path / "link").symlink_to("nothing")
    assert files.is_there(tmp_path / "link")
    assert not files.is_there(tmp_path / "link" / "below")
    (tmp_path / "file").touch()
    assert not files.is_there(tmp_path / "file" / "below")


def test_a_home_that_nobody_has_is_a_plain_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of")
    assert files.expand("~/x") == Path("/home/of/x")
    assert files.expand(Path("~no-such-user/x")) == Path("~no-such-user/x")
    places = ("RAVECTL_CACHE_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "SOPS_AGE_KEY_FILE")
    for variable in (*places, signing.KEY_VARIABLE):
        monkeypatch.setenv(variable, "~no-such-user/x")
    for find in (files.cache_dir, sops.find_identity, signing.account_signers):
        assert "~no-such-user/x" in str(find())
    assert sops.find_identity(Path("~no-such-user/k")).file == Path("~no-such-user/k").absolute()
    with pytest.raises(RavectlError, match="names no file"):
        signing.key_file(workspace.Workspace(Path("/nonexistent")))
    with pytest.raises(UsageError, match="there is no folder"):
        workspace.find(override=Path("~no-such-user/w"))


def test_an_account_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is put into a folder that is called ~."""
    monkeypatch.setattr("os.path.expanduser", str)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RAVECTL_CACHE_DIR", raising=False)
    with pytest.raises(HostError, match="has no home folder"):
        files.cache_dir()


def test_unwritable_folder_names_cause_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        files.write_atomic(tmp_path / "missing" / "f", "x")
    assert "no such file" in caught.value.message
    assert caught.value.hint


def test_lock_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "l"
    with (
        files.lock(path, "instance 'a'"),
        pytest.raises(RavectlError) as caught,
        files.lock(path, "instance 'a'"),
    ):
        pass
    assert "instance 'a' is in use by another ravectl" in caught.value.message


def test_staging_of_a_killed_process_is_swept(tmp_path: Path) -> None:
    script = (
        "import sys,time,pathlib\nfrom ravectl import files\n"
        f"with files.staging(pathlib.Path({str(tmp_path)!r}), 'build') as d:\n"
        " (d/'x').write_text('x'); print(d, flush=True); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    with files.staging(tmp_path, "build"):
        assert (left / "x").exists(), "a live maker's folder is not touched"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with files.staging(tmp_path, "build") as fresh:
        deadline = time.monotonic() + 5
        while left.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left.exists()
        assert fresh.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_a_link_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "lock").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"), files.lock(tmp_path / "lock", "it"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_what_another_account_left_is_not_swept(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file of somebody else")
    theirs = tmp_path / "build.theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    (tmp_path / "build.theirs.lock").symlink_to("elsewhere")
    os.chown(tmp_path / "build.theirs.lock", 65534, 65534, follow_symlinks=False)
    with files.staging(tmp_path, "build"):
        pass
    assert theirs.exists()
    assert not (tmp_path / "elsewhere").exists()


def test_bulky_work_is_in_a_folder_of_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fast_tmp", lambda need_bytes: tmp_path)
    made = files.private_tmp(1)
    assert files.is_private(made)
    assert made == files.private_tmp(1)
    made.chmod(0o755)
    with pytest.raises(HostError, match="somebody else"):
        files.private_tmp(1)


def test_no_room_is_said_before_work_begins(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="are free"):
        files.require_space(tmp_path / "not" / "yet", 10**18, "an image")
