"""Which folder is the workspace, and what may be in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ravectl import profile, workspace
from ravectl.errors import HostError, RavectlError, UsageError
from ravectl.workspace import Workspace


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    return folder


def test_without_a_mark_it_is_where_the_person_stands(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(deep)
    found = workspace.find()
    assert found == Workspace(deep)
    assert found.profile_file is None
    assert list(deep.iterdir()) == [], "looking makes nothing"


def test_a_profile_above_marks_it(deep: Path) -> None:
    profile = deep.parent / "rave.yaml"
    profile.touch()
    found = workspace.find(deep)
    assert found.root == deep.parent
    assert found.profile_file == profile


def test_the_nearest_mark_wins(deep: Path) -> None:
    (deep.parents[1] / "rave.yaml").touch()
    workspace.find(override=deep.parent).prepare()
    assert workspace.find(deep).root == deep.parent


def test_marks_of_the_wrong_kind_are_none(deep: Path) -> None:
    (deep.parent / "rave.yaml").mkdir()
    (deep.parent / ".rave").touch()
    assert workspace.find(deep).root == deep


def test_a_profile_that_cannot_be_read_is_no_missing_one(deep: Path) -> None:
    """Else `up` would make a machine of another profile, without a word."""
    path = deep.parent / "rave.yaml"
    path.symlink_to("gone.yaml")
    found = workspace.find(deep)
    assert found.root == deep.parent
    assert found.profile_file == path
    assert not found.make_profile()
    with pytest.raises(RavectlError, match="is a link to nothing"):
        profile.select(None, {}, path)
    path.unlink()
    path.mkdir()
    assert Workspace(deep.parent).profile_file == path
    with pytest.raises(RavectlError, match="is not a file"):
        profile.select(None, {}, path)


@pytest.mark.parametrize("mark", ["rave.yaml", ".rave"])
def test_what_a_stranger_left_above_is_no_mark(deep: Path, mark: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file of somebody else")
    path = deep.parent / mark
    path.mkdir() if mark == ".rave" else path.touch()
    assert workspace.find(deep).root == deep.parent
    os.chown(path, 65534, 65534)
    assert workspace.find(deep).root == deep
    # root at work in somebody's project: everything there is theirs
    os.chown(deep, 65534, 65534)
    assert workspace.find(deep).root == deep.parent


def test_an_override_beats_every_mark(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (deep / "rave.yaml").touch()
    assert workspace.find(deep, tmp_path).root == tmp_path
    monkeypatch.chdir(deep.parent)
    assert workspace.find(override=Path("c")).root == deep, "kept absolute"


def test_an_override_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        workspace.find(override=tmp_path / "none")
    assert str(tmp_path / "none") in caught.value.message
    assert "mkdir" in caught.value.hint


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.touch(), "is a file and no folder"),
        (lambda p: p.symlink_to(p.name), "is a link in a circle"),
        (lambda p: p.symlink_to("nowhere"), "is a link to nothing"),
    ],
)
def test_an_override_that_is_no_folder_is_told_as_what_it_is(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "odd")
    with pytest.raises(UsageError) as caught:
        workspace.find(override=tmp_path / "odd")
    assert said in caught.value.message
    assert caught.value.hint


def test_a_deleted_current_folder_is_told(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(deep)
    deep.rmdir()
    with pytest.raises(RavectlError, match="has been deleted"):
        workspace.find()


def test_the_state_is_private_and_git_does_not_see_it(tmp_path: Path) -> None:
    found = Workspace(tmp_path).prepare()
    assert found.state.stat().st_mode & 0o777 == 0o700
    for folder in (found.ca_dir, found.ssh_dir, found.instance_dir("main")):
        assert folder.is_relative_to(found.state)
        folder.mkdir(parents=True)
        (folder / "secret").touch()
    if shutil.which("git") is None:
        pytest.skip("no git here")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    status = subprocess.run(
        ["git", "-C", tmp_path, "status", "--porcelain", "--untracked-files=all"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert status.stdout == b""


def test_preparing_again_keeps_everything(tmp_path: Path) -> None:
    found = Workspace(tmp_path).prepare()
    (found.state / ".gitignore").write_text("*\n!shared\n")
    (found.state / "kept").touch()
    found.prepare()
    assert (found.state / ".gitignore").read_text() == "*\n!shared\n"
    assert (found.state / "kept").exists()
    assert found.state.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("make", [lambda p: p.touch(), lambda p: p.symlink_to(p.name)])
def test_a_state_that_is_no_folder_is_told_with_a_remedy_that_works(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / ".rave")
    with pytest.raises(HostError, match="is no folder") as caught:
        Workspace(tmp_path).prepare()
    _, _, remedy = caught.value.hint.partition(": ")
    subprocess.run(["sh", "-euc", remedy], check=True)
    assert Workspace(tmp_path).prepare().state.is_dir()


@pytest.mark.parametrize("make", [
    lambda p: p.mkdir(mode=0o755),
    lambda p: (p.with_name("elsewhere").mkdir(mode=0o700), p.symlink_to("elsewhere")),
])  # fmt: skip
def test_a_state_that_was_not_made_here_is_refused(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / ".rave")
    with pytest.raises(HostError, match="is not private") as caught:
        Workspace(tmp_path).prepare()
    assert "chmod 700" in caught.value.hint


def test_a_state_of_another_account_names_it(tmp_path: Path) -> None:
    """chmod cannot mend that, which is what `sudo ravectl` leaves an ordinary user with."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a file of somebody else")
    found = Workspace(tmp_path).prepare()
    os.chown(found.state, 65534, 65534)
    with pytest.raises(HostError, match="belongs to nobody") as caught:
        found.prepare()
    assert "chmod" not in caught.value.hint
    remedy = caught.value.hint.partition("if it is yours: sudo ")[2]
    subprocess.run(["sh", "-euc", remedy], check=True)
    found.prepare()


def test_a_private_file_in_the_workspace_is_kept_from_git(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    (tmp_path / ".gitignore").write_text("build")
    for path in (tmp_path / "my.key", tmp_path / "my.key", tmp_path.parent / "far.key"):
        space.keep_from_git(path)
    assert (tmp_path / ".gitignore").read_text() == "build\n/my.key\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda p: p.write_bytes(b"\xff\xfe"), "not text"), (lambda p: p.mkdir(), "a directory")],
)
def test_an_identity_that_cannot_be_read_is_told_and_no_other_taken(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    found = Workspace(tmp_path).prepare()
    assert found.identity_file is None
    make(found.state / "identity")
    with pytest.raises(RavectlError, match=said) as caught:
        _ = found.identity_file
    _, _, remedy = caught.value.hint.partition(": ")
    subprocess.run(["sh", "-euc", remedy.replace("KEYFILE", "my.key")], check=True)
    assert found.identity_file == tmp_path / "my.key"


def test_an_identity_in_the_workspace_moves_with_it(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "one").prepare()
    space.remember_identity(space.root / "my.key")
    space.root.rename(tmp_path / "two")
    assert Workspace(tmp_path / "two").identity_file == tmp_path / "two" / "my.key"
    Workspace(tmp_path / "two").remember_identity(Path("/k/far.key"))
    assert Workspace(tmp_path / "two").identity_file == Path("/k/far.key")


@pytest.mark.parametrize("name", ["a", "0", "main", "a-b", "a--b", "x" * 32])
def test_names_of_instances(name: str) -> None:
    assert Workspace(Path("/w")).instance_dir(name) == Path("/w/.rave/instances") / name


@pytest.mark.parametrize(
    "name", ["", "-", "-a", "a-", "A", "a_b", "a.b", "..", "a/b", "a b", "a\n", "ä", "x" * 33]
)
def test_what_is_no_name_of_an_instance(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Workspace(Path("/w")).instance_dir(name)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@given(st.text())
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    where = Workspace(Path("/w"))
    try:
        folder = where.instance_dir(name)
    except UsageError:
        return
    assert folder.parent == where.instances_dir
    assert os.path.normpath(folder) == str(folder)
