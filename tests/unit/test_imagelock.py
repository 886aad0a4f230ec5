"""rave.lock: what is written is read back, and drift is told part by part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ravectl import imagelock
from ravectl.errors import RavectlError
from ravectl.imagelock import Lock

WORDS = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=20)
ROWS = st.lists(st.tuples(WORDS, WORDS, WORDS), max_size=6).map(lambda r: tuple(sorted(r)))


def lock(*packages: tuple[str, str, str]) -> Lock:
    return Lock("debian", "trixie", packages, (("vibe-kanban", "0.0.71", "sha512-a"),))


@given(ROWS, ROWS)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    packages: tuple[tuple[str, str, str], ...],
    npm: tuple[tuple[str, str, str], ...],
) -> None:
    path = tmp_path_factory.mktemp("lock") / "rave.lock"
    made = Lock("debian", "trixie", packages, npm)
    assert imagelock.write(path, made)
    assert imagelock.read(path) == made
    assert not imagelock.write(path, made), "the same lock is not written twice"


def test_a_part_stands_on_a_line_of_its_own() -> None:
    text = imagelock.dump(lock(("bash", "5.2", "aa"), ("zlib1g", "1.3", "bb")))
    assert '    ["bash", "5.2", "aa"],\n    ["zlib1g", "1.3", "bb"]\n' in text
    assert json.loads(text)["version"] == imagelock.VERSION


def test_drift_is_told_part_by_part() -> None:
    was = lock(("bash", "5.2", "aa"), ("gone", "1", "cc"), ("same", "1", "dd"), ("x", "1", "ee"))
    now = lock(("bash", "5.3", "ab"), ("new", "2", "ff"), ("same", "1", "dd"), ("x", "1", "e0"))
    assert imagelock.drift(was, now) == [
        "bash: 5.2 -> 5.3",
        "gone: 1 -> gone",
        "new: new, 2",
        "x 1: other bits under the same version",
    ]
    assert imagelock.drift(was, was) == []


def test_refusal_names_what_drifted_and_caps_the_list() -> None:
    imagelock.require_same(lock(("a", "1", "x")), lock(("a", "1", "x")))
    was = lock(*((f"p{n:02}", "1", "x") for n in range(40)))
    now = lock(*((f"p{n:02}", "2", "y") for n in range(40)))
    with pytest.raises(RavectlError) as e:
        imagelock.require_same(was, now)
    assert "40 parts" in e.value.message
    assert "p00: 1 -> 2" in e.value.details
    assert e.value.details.splitlines()[-1] == "and 28 more"
    assert e.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 99}', '{"version": 1, "engine": "debian"}',
     '{"version": 1, "engine": "debian", "suite": "trixie", "packages": [["a"]], "npm": []}'],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rave.lock"
    path.write_text(text)
    with pytest.raises(RavectlError, match="is damaged") as e:
        imagelock.read(path)
    assert "git" in e.value.hint


def test_no_lock_yet(tmp_path: Path) -> None:
    with pytest.raises(RavectlError, match=r"there is no rave\.lock") as e:
        imagelock.read(tmp_path / "rave.lock")
    assert "without --locked" in e.value.hint
