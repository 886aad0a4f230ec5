"""What the command line does with what surrounds it: files in its way, closed streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ravectl import instance, profile
from ravectl.model import EngineName
from ravectl.plan import make_plan
from ravectl.workspace import Workspace
from tests.conftest import Tool

LONG = "a" * 300


def explained(done: subprocess.CompletedProcess[str]) -> bool:
    return "error: " in done.stderr and "fix: " in done.stderr and "defect" not in done.stderr


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("render", LONG), ("image", "verify", "--workspace", LONG), ("status", "--workspace", LONG)],
    ids=lambda words: words[0],
)
def test_a_name_that_is_too_long_is_no_defect(tool: Tool, words: tuple[str, ...]) -> None:
    done = tool(*words, code=1)
    assert explained(done)
    assert f"{LONG}: File name too long\n  fix: ls -ld " in done.stderr


def test_a_folder_in_a_files_place_is_named(tool: Tool) -> None:
    in_the_way = tool.workspace / ".rave" / "secrets.lock"
    in_the_way.mkdir(parents=True)
    (tool.workspace / ".rave").chmod(0o700)
    done = tool("init", "--identity", str(tool.workspace / "my key"), code=1)
    assert explained(done)
    assert f"cannot use {in_the_way}: Is a directory" in done.stderr
    assert "Traceback (most recent" in subprocess.run(
        [sys.executable, "-m", "ravectl", "--verbose", "init"],
        env=tool.environment, capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip


def test_the_remedy_for_a_file_can_be_typed(tmp_path: Path, tool: Tool) -> None:
    odd = f"it's\n{LONG}"
    done = tool("render", str(tmp_path / odd), code=1)
    assert explained(done)
    assert done.stderr.startswith("error: cannot use ")
    cause, remedy = done.stderr.split("\n", 1)
    assert "it's\\n" in cause, "one line of cause"
    ran = subprocess.run(
        ["sh", "-c", remedy.strip().removeprefix("fix: ")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "too long" in ran.stderr


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("words", "code"),
    [("plan", 0), ("status", 0), ("verify --explain ZZ", 2), ("secrets set ccr/api-key", 2)],
)
def test_a_closed_stream_changes_no_exit_code(
    tool: Tool, words: str, code: int, closed: str
) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m ravectl {words} {closed}"],
        env=tool.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "defect" not in done.stderr
    # what is for a person is not taken for a result when nobody hears it
    heard = words == "plan" and " >&-" not in f" {closed}"
    assert bool(done.stdout) == heard, done.stdout


def test_no_file_gets_the_number_of_a_closed_stream(tool: Tool) -> None:
    script = (
        "import os, sys\n"
        "from ravectl import cli\n"
        "cli.app = lambda: print(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), flush=True)\n"
        "cli.main()\n"
    )
    file = tool.workspace / "file"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" "$2" <&- 2>&-', sys.executable, script, file],
        env=tool.environment, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert int(done.stdout) > 2


# --- instances -----------------------------------------------------------------------------------


@pytest.fixture
def stopped(tool: Tool) -> Tool:
    """A workspace with an instance that was never started."""
    made = make_plan(**profile.select("safe", {}, None).plan_arguments())
    Workspace(tool.workspace).prepare()
    tool.instance().folder.mkdir(parents=True)
    tool.instance().save(instance.new_record(made, EngineName.DEBIAN))
    return tool


@pytest.mark.parametrize("spoil", ["record", "console"])
def test_a_damaged_instance_does_not_hide_the_others(stopped: Tool, spoil: str) -> None:
    bad = stopped.instance("bad")
    bad.folder.mkdir()
    if spoil == "record":
        (bad.folder / "instance.json").write_text('{"form": 1}')
    else:
        bad.save(stopped.instance().require_record())
        bad.console_log.mkdir()
    done = stopped("status", "--json", code=1)
    assert json.loads(stopped("status", "--name", "bad", "--json", code=1).stdout) == [
        json.loads(done.stdout)[0]
    ]
    damaged, good = json.loads(done.stdout)
    assert (good["name"], good["state"]) == ("default", "stopped")
    assert damaged["state"] == "damaged"
    assert (damaged["name"], damaged["folder"]) == ("bad", str(bad.folder))
    assert damaged["message"] in done.stderr
    assert explained(done)
    done = stopped("status", code=1)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["bad", "damaged"],
        ["default", "stopped"],
    ]
    assert explained(done)
    (bad.folder / "instance.json").unlink()


@pytest.mark.parametrize(
    "words",
    [("logs", "-p", "foo"), ("logs", "-p", "err..foo"), ("console", "--lines", "-5")],
)
def test_what_cannot_be_asked_of_a_stopped_machine_is_told(
    stopped: Tool, words: tuple[str, ...]
) -> None:
    done = stopped(*words, code=2)
    assert explained(done)
    assert done.stdout == ""


def test_no_lines_of_a_console_are_none(stopped: Tool) -> None:
    stopped.instance().console_log.write_text("one\ntwo\n")
    for words in (("logs", "-n"), ("console", "--lines")):
        assert stopped(*words, "0").stdout == ""
        assert stopped(*words, "1").stdout == "two\n"
    assert stopped("logs", "-n", "all", "-S", "-1h", "-p", "0..4").stdout == "one\ntwo\n"


@pytest.mark.parametrize(
    "words",
    [("down", "--timeout", "inf"), ("down", "--timeout", "-1"), ("up", "--timeout", "nan"),
     ("exec", "--timeout", "inf", "--", "true"), ("verify", "--watch", "--interval", "inf")],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_time_to_wait_is_told(stopped: Tool, words: tuple[str, ...]) -> None:
    done = stopped(*words, code=2)
    assert explained(done)
    assert "is no time to wait" in done.stderr


def test_a_value_that_is_no_text_is_told(tool: Tool) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ravectl", "secrets", "set", "agents/anthropic-api-key"],
        env=tool.environment, input=b"\xff\xfe" * 10, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert b"agents/anthropic-api-key is not text" in done.stderr


def test_init_below_a_workspace_says_which_it_is(tool: Tool) -> None:
    (tool.workspace / "rave.yaml").write_text("extends: safe\n")
    below = tool.workspace / "below"
    below.mkdir()
    environment = {k: v for k, v in tool.environment.items() if k != "RAVECTL_WORKSPACE"}
    argv = [sys.executable, "-m", "ravectl", "init", "--identity", str(tool.workspace / "my.key")]
    said = [
        subprocess.run(
            [*argv, *more], env=environment, cwd=below, capture_output=True, text=True, check=True
        ).stderr
        for more in ([], ["--workspace", "."])
    ]
    assert f"the workspace is {tool.workspace}, which has" in said[0]
    assert "ravectl init --workspace ." in said[0]
    assert "ravectl init" not in said[1]
    assert (below / "secrets.yaml").exists()


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", ["", "../images", "f" * 15, "F" * 16, f"{'f' * 16}\n", LONG])
def test_what_is_no_digest_is_told(tool: Tool, digest: str) -> None:
    for words in (("image", "verify"), ("image", "sign")):
        done = tool(*words, digest, code=2)
        assert explained(done)
        assert "ravectl status --json" in done.stderr
    assert list(tool.workspace.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "a,b", '"'])
def test_a_signer_whose_name_would_break_the_list_is_refused(tool: Tool, name: str) -> None:
    assert explained(tool("image", "key", name, code=2))
    assert list(tool.workspace.iterdir()) == []
