"""A hardware key as a recipient: through the real sops, by a plugin that only lacks the hardware.

The plugin speaks age's plugin protocol (C2SP/age-plugin). Its "device" turns bytes around.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ravectl import rotate, sops, vault
from ravectl.errors import HostError, UsageError
from ravectl.plan import SECRETS
from ravectl.sops import Identity
from ravectl.workspace import Workspace

PLUGIN = """#!%s
import base64, sys

def encode(data):
    text = base64.b64encode(data).decode().rstrip("=")
    lines = [text[i:i + 64] for i in range(0, len(text), 64)] or [""]
    return "\\n".join(lines + ([""] if len(lines[-1]) == 64 else []))

def send(*words, body=b""):
    sys.stdout.write("-> " + " ".join(words) + "\\n" + encode(body) + "\\n")
    sys.stdout.flush()

def receive():
    words = sys.stdin.readline().split()[1:]
    text = ""
    while True:
        line = sys.stdin.readline().rstrip("\\n")
        text += line
        if len(line) < 64:
            return words, base64.b64decode(text + "=" * (-len(text) %% 4))

phase, asked = sys.argv[1], []
while True:
    words, body = receive()
    if words[0] == "done":
        break
    asked.append((words, body))
if phase == "--age-plugin=recipient-v1":
    keys = [body for words, body in asked if words[0] == "wrap-file-key"]
    for number, key in enumerate(keys):
        send("recipient-stanza", str(number), "ravetest", body=key[::-1])
        receive()
else:
    for words, body in asked:
        if words[0] == "recipient-stanza" and words[2] == "ravetest":
            send("file-key", words[1], body=body[::-1])
            receive()
send("done")
"""
CHARSET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


def bech32(hrp: str, data: bytes) -> str:
    """BIP 173, without its limit of length."""
    bits = "".join(f"{b:08b}" for b in data)
    bits += "0" * (-len(bits) % 5)
    words = [int(bits[i : i + 5], 2) for i in range(0, len(bits), 5)]
    expanded = [ord(c) >> 5 for c in hrp] + [0] + [ord(c) & 31 for c in hrp]
    check = 1
    for value in [*expanded, *words, 0, 0, 0, 0, 0, 0]:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for i, g in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= g if top >> i & 1 else 0
    check ^= 1
    words += [check >> 5 * (5 - i) & 31 for i in range(6)]
    return f"{hrp}1{''.join(CHARSET[w] for w in words)}"


RECIPIENT = bech32("age1ravetest", b"device 1")


@pytest.fixture
def hardware(tmp_path: Path) -> Identity:
    """The key file that a plugin's tool writes."""
    identity = bech32("age-plugin-ravetest-", b"device 1").upper()
    path = tmp_path / "hardware.txt"
    path.write_text(f"#    Recipient: {RECIPIENT}\n{identity}\n")
    return Identity(path)


@pytest.fixture
def plugged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    plugin = programs / "age-plugin-ravetest"
    plugin.write_text(PLUGIN % sys.executable)
    plugin.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


@pytest.mark.usefixtures("plugged_in")
def test_a_workspace_is_opened_by_hardware_or_by_software(
    tmp_path: Path, hardware: Identity
) -> None:
    space = Workspace(tmp_path / "space")
    space.root.mkdir()
    software = Identity(tmp_path / "keys.txt")
    vault.init(space, SECRETS, software, [RECIPIENT])
    shared = vault.Places(space).shared
    assert set(vault.look(shared).recipients) == {RECIPIENT, *software.recipients()}
    assert vault.read(shared, hardware) == vault.read(shared, software)


@pytest.mark.usefixtures("plugged_in")
def test_hardware_alone(tmp_path: Path, hardware: Identity) -> None:
    space = Workspace(tmp_path / "space")
    space.root.mkdir()
    done = vault.init(space, SECRETS, hardware)
    assert done.recipients == (RECIPIENT,)
    assert vault.ensure(space, SECRETS, hardware).values


def test_a_plugin_that_is_not_there_is_named(
    hardware: Identity, plugged_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sops.encrypt({"secrets": {"a": "b"}}, [RECIPIENT])
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
    for action in (
        lambda: sops.encrypt({"secrets": {"a": "b"}}, [RECIPIENT]),
        lambda: sops.decrypt(text, Path("secrets.yaml"), hardware),
    ):
        with pytest.raises(HostError, match="age-plugin-ravetest is not installed") as caught:
            action()
        assert caught.value.hint


def test_ravectl_does_not_put_software_in_the_place_of_hardware(
    tmp_path: Path, hardware: Identity
) -> None:
    with pytest.raises(UsageError, match="identity of a plugin"):
        rotate.rotate_identity(Workspace(tmp_path), hardware)
