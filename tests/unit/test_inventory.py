"""What an image holds: whatever its files are called, what is written is what is read."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ravectl import files, inventory
from ravectl.errors import RavectlError
from ravectl.inventory import Entry

# a path's bytes: all but the null byte; os.fsdecode gives what is no UTF-8 as surrogates
NAMES = st.binary(min_size=1, max_size=40).map(lambda b: "/" + os.fsdecode(b.replace(b"\0", b"x")))
ENTRIES = st.one_of(
    st.builds(
        Entry, st.just("file"), st.integers(0, 0o7777), st.integers(0, 2**31), st.integers(0, 9),
        st.binary(max_size=9).map(files.digest_bytes), st.sampled_from(["", "0100000200"]),
    ),
    st.builds(Entry, st.just("dir"), st.integers(0, 0o7777), st.just(0), st.just(0)),
    st.builds(Entry, st.just("link"), st.just(0o777), st.just(0), st.just(0), NAMES),
)  # fmt: skip


@given(st.dictionaries(NAMES, ENTRIES, max_size=8))
def test_what_is_written_is_what_is_read(entries: dict[str, Entry]) -> None:
    path = Path(os.environ["XDG_CONFIG_HOME"]) / "inventory"
    path.write_bytes(inventory.dump(entries))
    assert inventory.load(path) == entries
    assert inventory.dump(dict(reversed(entries.items()))) == path.read_bytes()


def test_a_tree_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "etc" / "a b#c\n").mkdir(parents=True)
    (tmp_path / "etc" / "a b#c\n" / "file").write_text("x")
    (tmp_path / "etc" / "a b#c\n" / "file").chmod(0o4750)
    (tmp_path / "etc" / "link").symlink_to("a b#c\n/file")
    os.mkfifo(tmp_path / "etc" / "pipe")
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "not").touch()
    found = inventory.take(tmp_path)
    assert list(found) == ["/etc", "/etc/a b#c\n", "/etc/a b#c\n/file", "/etc/link", "/etc/pipe"]
    mine = (os.getuid(), os.getgid())
    assert found["/etc/a b#c\n/file"] == Entry("file", 0o4750, *mine, files.digest_bytes(b"x"))
    assert found["/etc/link"] == Entry("link", 0o777, *mine, "a b#c\n/file")
    assert found["/etc/pipe"].kind == "other"


WHOLE = gzip.compress(b"#mtree\n")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no gzip", gzip.compress(b"no mtree\n"), gzip.compress(b"#mtree\n./a\n"),
        gzip.compress(b"#mtree\n./a type=file mode=9 uid=0 gid=0\n"), gzip.compress(b"\xff"),
        WHOLE[:-4], WHOLE[:10] + b"\xff" * 9,
    ],
    ids=["empty", "no gzip", "no mtree", "no type", "no mode", "no text", "cut", "damaged"],
)  # fmt: skip
def test_one_that_is_damaged_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / inventory.NAME
    path.write_bytes(data)
    with pytest.raises(RavectlError, match="cannot be read") as caught:
        inventory.load(path)
    assert "build it again" in caught.value.hint
