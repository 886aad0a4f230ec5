"""Are a workspace's secrets in order? What `ravectl secrets check` looks at.

Each function returns findings, a line each, that never quote a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ravectl import command, credentials, journal, sops, vault
from ravectl.errors import RavectlError
from ravectl.instance import list_instances
from ravectl.model import Secret, SecretKind, SecretScope
from ravectl.verify import secrecy
from ravectl.workspace import Workspace

MAX_BLOB = 2**20  # bytes; a larger file in git is no configuration
BATCH_BYTES = 32 * 2**20
_PRIVATE_KEY = re.compile(
    r"AGE-SECRET-KEY-1[A-Z0-9]{20}"
    r"|-----BEGIN (?:OPENSSH |EC |RSA )?PRIVATE KEY-----\s+[A-Za-z0-9+/]{20}"
)


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what mends it."""

    text: str
    remedy: str


def check(
    workspace: Workspace, declared: Sequence[Secret], identity: sops.Identity
) -> list[Finding]:
    """Everything that is wrong with a workspace's secrets. Raises as `vault.read` does."""
    places = vault.Places(workspace)
    found: list[Finding] = []
    if journal.read(workspace.state) is not None:
        found.append(Finding("a change was cut short", "end it: ravectl secrets deliver"))
    shared = vault.read(places.shared, identity)
    found += schema(shared, declared, SecretScope.WORKSPACE, vault.FILE)
    found += stale(shared, declared, vault.FILE)
    found += recipients(places.shared, places.recipients(), vault.FILE)
    values = dict(shared.values) | {f"{n} (before)": v for n, v in shared.previous.items()}
    for instance in list_instances(workspace.instances_dir):
        path = places.machine(instance.folder)
        if path.exists():
            own = vault.read(path, identity)
            where = f"machine {instance.name}"
            if instance.record is not None:
                found += [
                    Finding(f"{where}: {text}", remedy)
                    for text, remedy in vault.unreachable(instance.record.plan, shared)
                ]
            found += schema(own, declared, SecretScope.INSTANCE, where)
            found += stale(own, declared, where)
            found += recipients(path, places.recipients(), where)
            values |= {f"{n} of {instance.name}": v for n, v in own.values.items()}
    signing_key = workspace.signing_dir / "id_ed25519"
    keys = {"the operator's key": places.operator_key, "the signing key": signing_key}
    found += modes([p for p in (*keys.values(), identity.file) if p is not None])
    hidden = {n: v for n, v in values.items() if not v.startswith("-----BEGIN CERTIFICATE")}
    hidden |= {name: path.read_text() for name, path in keys.items() if path.exists()}
    return found + history(workspace.root, hidden)


def schema(
    held: vault.Vault, declared: Iterable[Secret], scope: SecretScope, where: str
) -> list[Finding]:
    """What is missing, unknown or malformed in a vault. Pure."""
    known = {s.name: s for s in declared if s.scope is scope}
    found = []
    for name, s in known.items():
        value = held.values.get(name)
        if value is None:
            if s.kind is not SecretKind.GIVEN:
                remedy = "ravectl up makes it; a machine that runs: ravectl down first"
                found.append(Finding(f"{where}: {name} is missing", remedy))
        elif why := credentials.fault(s.kind, value):
            found.append(Finding(f"{where}: {name} is {why}", renewal(s)))
    for name in held.values.keys() - known.keys():
        remedy = f"its reader is gone: ravectl secrets set {name} --unset"
        found.append(Finding(f"{where}: {name} is not declared", remedy))
    return found


def renewal(s: Secret) -> str:
    """The command that gives a secret another value."""
    if s.kind is SecretKind.GIVEN:
        return f"ravectl secrets set {s.name}"
    if s.kind is SecretKind.SSH_KEY:
        return "ravectl rotate-secrets --ssh"
    return f"ravectl rotate-secrets {'ca/key' if s.name == 'ca/cert' else s.name}"


def stale(held: vault.Vault, declared: Iterable[Secret], where: str) -> list[Finding]:
    """Values that are older than 90 days. Pure but for the clock."""
    found = []
    for s in declared:
        if s.name not in held.values:
            continue
        try:
            age = vault.now() - vault.parse_stamp(held.changed.get(s.name, ""))
        except ValueError:
            found.append(Finding(f"{where}: {s.name} has no date", renewal(s)))
            continue
        # an authority is made for ten years; who trusts it would have to trust another
        if age > vault.STALE and s.kind not in (SecretKind.CA_KEY, SecretKind.CA_CERT):
            found.append(Finding(f"{where}: {s.name} is {age.days} days old", renewal(s)))
    return found


def recipients(path: Path, wanted: Sequence[str], where: str) -> list[Finding]:
    """Where a file is encrypted for others than .sops.yaml says."""
    seen = set(vault.look(path).recipients)
    if seen == set(wanted):
        return []
    missing, extra = set(wanted) - seen, seen - set(wanted)
    parts = [f"not for {r}" for r in sorted(missing)] + [f"also for {r}" for r in sorted(extra)]
    return [
        Finding(
            f"{where} is encrypted {', '.join(parts)}, against .sops.yaml",
            "if .sops.yaml is right: ravectl secrets deliver",
        )
    ]


def modes(paths: Iterable[Path]) -> list[Finding]:
    """Private files that others may read."""
    return [
        Finding(
            f"{p} can be read by others (mode {p.stat().st_mode & 0o777:o})", f"chmod 600 '{p}'"
        )
        for p in paths
        if p.exists() and p.stat().st_mode & 0o077
    ]


# --- git -------------------------------------------------------------------------------------


def history(root: Path, values: Mapping[str, str]) -> list[Finding]:
    """Plaintext values and private keys in any object of the git repository around `root`."""
    try:
        top = _git(root, "rev-parse", "--git-dir")
    except RavectlError:
        return []
    if top.returncode != 0:
        return []
    found = []
    for batch in _batches(_blobs(root)):
        # one blob after the other, so that a name can be told
        for oid, text in _contents(root, batch):
            found += [_in_git(root, oid, what) for what in leaks(text, values)]
    return found


def leaks(text: str, values: Mapping[str, str]) -> list[str]:
    """The names of the values that a text holds, and "a private key" for any other. Pure."""
    found = [name for name, value in values.items() if secrecy.core(value) in text]
    if not found and _PRIVATE_KEY.search(text):
        found.append("a private key")
    return found


def _blobs(root: Path) -> list[tuple[str, int]]:
    form = "--batch-check=%(objecttype) %(objectname) %(objectsize)"
    out = _git(root, "cat-file", "--batch-all-objects", form).stdout
    rows = (line.split() for line in out.splitlines())
    return [(r[1], int(r[2])) for r in rows if r[0] == "blob" and int(r[2]) <= MAX_BLOB]


def _batches(blobs: Iterable[tuple[str, int]]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    size = 0
    for oid, length in blobs:
        if size + length > BATCH_BYTES and batches[-1]:
            batches.append([])
            size = 0
        batches[-1].append(oid)
        size += length
    return batches


def _contents(root: Path, oids: Sequence[str]) -> list[tuple[str, str]]:
    if not oids:
        return []
    ask = "\n".join(oids).encode() + b"\n"
    out = _git(root, "cat-file", "--batch", stdin=ask).stdout
    # text decoding keeps every character that a secret can have, so splitting by the heads is safe
    parts = re.split(r"^([0-9a-f]{40,64}) blob \d+$", out, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _in_git(root: Path, oid: str, what: str) -> Finding:
    shown = _git(root, "log", "--all", "--format=%h", "--name-only", f"--find-object={oid}").stdout
    words = [line for line in shown.splitlines() if line]
    where = f"{words[-1]}, commit {words[-2]}" if len(words) > 1 else f"object {oid[:12]}"
    remedy = "count it as known to all: rotate it; then take it out of the history"
    return Finding(f"git holds {what} in plain text ({where})", remedy)


def _git(root: Path, *words: str, stdin: bytes = b"") -> command.Result:
    return command.run(["git", "-C", root, *words], stdin=stdin, check=False, timeout=300)
