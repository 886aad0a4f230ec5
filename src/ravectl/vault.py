"""The secrets of a workspace: the encrypted files, what is in them, and what a guest gets.

secrets.yaml                   what all machines of the workspace share; made to be committed
.sops.yaml                     whom it is encrypted for
.rave/instances/N/secrets.yaml what is the machine N's own; never leaves this workspace

Values are in memory only: encrypted files are written, and one *bundle* for each start of a
machine. A bundle holds what that machine's readers need and nothing else, encrypted by age
for an identity that is made for that start and kept nowhere on the host afterwards.
"""

from __future__ import annotations

import datetime
import io
import os
import shlex
import tarfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ravectl import credentials, files, journal, sops
from ravectl.errors import RavectlError, UsageError
from ravectl.model import EngineName, Plan, Secret, SecretKind, SecretScope
from ravectl.workspace import Workspace

FORMAT = 1
FILE = "secrets.yaml"
RULES_FILE = ".sops.yaml"
PATTERN = r"(^|/)secrets\.yaml$"
STALE = datetime.timedelta(days=90)  # the contract's "SecretsStale"
MAGIC = "rave-bundle 1"


@dataclass(frozen=True)
class Vault:
    """What one encrypted file holds. Values never show in its representation."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    changed: Mapping[str, str] = field(default_factory=dict)  # name -> RFC 3339
    previous: Mapping[str, str] = field(default_factory=dict, repr=False)  # still accepted,
    until: Mapping[str, str] = field(default_factory=dict)  # until then

    def with_value(self, name: str, value: str, now: datetime.datetime) -> Vault:
        """This with another value, which is dated now."""
        return replace(
            self,
            values={**self.values, name: value},
            changed={**self.changed, name: stamp(now)},
        )

    def without(self, name: str) -> Vault:
        """This without a name."""
        rest = {k: v for k, v in self.values.items() if k != name}
        dates = {k: v for k, v in self.changed.items() if k != name}
        return replace(self, values=rest, changed=dates)

    def with_grace(self, name: str, value: str, until: datetime.datetime) -> Vault:
        """This with a former value that is accepted for a while."""
        return replace(
            self,
            previous={**self.previous, name: value},
            until={**self.until, name: stamp(until)},
        )

    def without_grace(self, name: str) -> Vault:
        """This without a former value."""
        previous = {n: v for n, v in self.previous.items() if n != name}
        until = {n: t for n, t in self.until.items() if n != name}
        return replace(self, previous=previous, until=until)

    def without_expired(self, now: datetime.datetime) -> Vault:
        """This without the former values whose time is over."""
        live = {n for n, t in self.until.items() if parse_stamp(t) > now}
        return replace(
            self,
            previous={n: v for n, v in self.previous.items() if n in live},
            until={n: t for n, t in self.until.items() if n in live},
        )


@dataclass(frozen=True)
class Sealed:
    """An encrypted file: what can be known of it without a key."""

    recipients: tuple[str, ...]
    names: tuple[str, ...]
    changed: Mapping[str, str]
    until: Mapping[str, str]


def stamp(moment: datetime.datetime) -> str:
    """A time as the files have it."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_stamp(text: str) -> datetime.datetime:
    """The inverse of `stamp`; raises ValueError."""
    return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)


def now() -> datetime.datetime:
    """The present, in UTC."""
    return datetime.datetime.now(datetime.UTC)


# --- files -----------------------------------------------------------------------------------


def to_document(vault: Vault) -> dict[str, Any]:
    """A vault as sops encrypts it; keys that end in _unencrypted stay readable."""
    return {
        "format_unencrypted": FORMAT,
        "secrets": dict(sorted(vault.values.items())),
        "changed_unencrypted": dict(sorted(vault.changed.items())),
        "previous": dict(sorted(vault.previous.items())),
        "previous_until_unencrypted": dict(sorted(vault.until.items())),
    }


def from_document(document: Mapping[str, Any], where: Path) -> Vault:
    """The vault in a decrypted document; RavectlError when it has another form."""
    if document.get("format_unencrypted") != FORMAT:
        raise RavectlError(
            f"{where} is of a format that this ravectl does not know",
            "use the ravectl that wrote it, or a newer one",
        )
    parts = [
        document.get(key, {})
        for key in ("secrets", "changed_unencrypted", "previous", "previous_until_unencrypted")
    ]
    for part in parts:
        if not isinstance(part, dict) or not all(isinstance(v, str) for v in part.values()):
            raise RavectlError(
                f"{where} does not have the form of a secrets file", sops.take_back(where)
            )
    return Vault(*parts)


def read(path: Path, identity: sops.Identity) -> Vault:
    """Decrypt a file. Raises RavectlError that names the key or the damage."""
    return from_document(sops.decrypt(_text(path), path, identity), path)


def look(path: Path) -> Sealed:
    """What a file says without a key."""
    text = _text(path)
    recipients = sops.recipients_of(text, path)
    document = yaml.safe_load(text)
    parts = [
        document.get(k) or {}
        for k in ("secrets", "changed_unencrypted", "previous_until_unencrypted")
    ]
    if not all(isinstance(p, dict) for p in parts):
        raise RavectlError(f"{path} does not have the form of a secrets file", sops.take_back(path))
    dates = [{str(k): str(v) for k, v in p.items()} for p in parts[1:]]
    return Sealed(recipients, tuple(map(str, parts[0])), dates[0], dates[1])


def write(path: Path, vault: Vault, recipients: Iterable[str], mode: int = 0o644) -> None:
    """Encrypt a vault into a file, in one step: the old file or the new, never half of one."""
    require_no_link(path)
    files.write_atomic(path, sops.encrypt(to_document(vault), tuple(recipients)), mode)


def require_no_link(path: Path) -> None:
    """RavectlError when a link is where a file is to be replaced: it would be cut, and what it led
    to would keep old secrets."""
    if path.is_symlink():
        raise RavectlError(
            f"{path} is a link, and secrets are not changed through one",
            "work in the folder that it leads to, or put the file itself here: "
            f"ls -l {shlex.quote(str(path))}",
        )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise RavectlError(f"there is no {path}", sops.take_back(path, gone=True)) from None
    except (OSError, UnicodeDecodeError) as e:
        reason = (getattr(e, "strerror", None) or "it is not text").lower()
        raise RavectlError(
            f"cannot read {path}: {reason}", f"see to it: ls -l {shlex.quote(str(path))}"
        ) from None


# --- a workspace -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where a workspace keeps its secrets."""

    workspace: Workspace

    @property
    def shared(self) -> Path:
        """What all its machines share, encrypted."""
        return self.workspace.root / FILE

    @property
    def rules(self) -> Path:
        """Whom that is encrypted for: sops' own configuration."""
        return self.workspace.root / RULES_FILE

    @property
    def operator_key(self) -> Path:
        """The operator's private SSH key."""
        return self.workspace.ssh_dir / "id_ed25519"

    @property
    def ca_cert(self) -> Path:
        """The authority's certificate, for clients; a copy of what is in the encrypted file."""
        return self.workspace.ca_dir / "ca.crt"

    @property
    def lock(self) -> Path:
        """Held by whoever changes secrets."""
        return self.workspace.state / "secrets.lock"

    def machine(self, folder: Path) -> Path:
        """What is a machine's own, encrypted."""
        return folder / FILE

    def recipients(self) -> tuple[str, ...]:
        """Whom files are encrypted for, by .sops.yaml."""
        return recipients_in(self.rules)


def recipients_in(path: Path) -> tuple[str, ...]:
    """The recipients that a .sops.yaml names for our files; RavectlError when there are none."""
    try:
        rules = yaml.safe_load(_text(path))
        for rule in rules["creation_rules"]:
            if rule["path_regex"] == PATTERN:
                found = rule["age"]
                words = found.split(",") if isinstance(found, str) else found
                if recipients := tuple(str(w).strip() for w in words if str(w).strip()):
                    return recipients
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        pass
    raise RavectlError(
        f"{path} names no recipients for {FILE}",
        f"give it a creation rule with path_regex: {PATTERN} and age: age1...",
    )


def rules_with(places: Places, recipients: Iterable[str]) -> str:
    """.sops.yaml with these recipients; what else a person keeps in it stays, but for comments."""
    rule = {"path_regex": PATTERN, "age": ",".join(recipients)}
    document: dict[str, Any] = {}
    if places.rules.exists():
        document = _rules(places.rules)
    others = [r for r in document.get("creation_rules") or [] if r.get("path_regex") != PATTERN]
    document["creation_rules"] = [rule, *others]
    head = "# whom sops encrypts for; change it by: ravectl secrets recipients\n"
    return head + yaml.safe_dump(document, sort_keys=False, width=1000)


def _rules(path: Path) -> dict[str, Any]:
    """A person's .sops.yaml; UsageError when it is none."""
    try:
        found = yaml.safe_load(_text(path))
    except yaml.YAMLError:
        found = ""
    document = found or {} if found != "" else None
    rules = document.get("creation_rules") or [] if isinstance(document, dict) else None
    if not isinstance(rules, list) or not all(isinstance(r, dict) for r in rules):
        raise UsageError(
            f"{path} is no configuration of sops", f"mend it, or put it aside: mv '{path}' old.yaml"
        )
    return dict(document or {})


@dataclass(frozen=True)
class Initialized:
    """What `init` made."""

    identity: sops.Identity
    made_identity: bool
    recipients: tuple[str, ...]


def init(
    workspace: Workspace,
    secrets: tuple[Secret, ...],
    identity: sops.Identity,
    recipients: Iterable[str] = (),
) -> Initialized:
    """Make a workspace's secrets: every one that is declared, encrypted for us and `recipients`.

    Raises UsageError when there are some already (nothing is overwritten) or a recipient is
    none, HostError when sops is missing or a folder cannot be written.
    """
    places = Places(workspace)
    if os.path.lexists(places.shared):
        raise UsageError(
            f"{places.shared} exists already, and init overwrites nothing",
            "use it: ravectl up; or go to an empty folder",
        )
    sops.find_sops()
    require_no_link(places.rules)
    extra = tuple(recipients)
    rules_with(places, extra)  # refuses a bad .sops.yaml before anything is made
    if extra:
        sops.encrypt({}, extra)  # refuses a bad one before anything is made
    workspace.prepare()
    with files.lock(places.lock, "the workspace's secrets", wait=True):
        if os.path.lexists(places.shared):
            raise UsageError(f"{places.shared} exists already", "use it: ravectl up")
        made = not identity.exists()
        if identity.file is not None:
            workspace.keep_from_git(identity.file)
            if made:
                sops.make_identity(identity.file)
        everyone = tuple(dict.fromkeys((*identity.recipients(), *extra)))
        shared = complete(Vault(), secrets, now())
        if identity.file is not None and identity.file != sops.find_identity().file:
            workspace.remember_identity(identity.file)
        # first what it is encrypted for: secrets.yaml is what says that all is done
        files.write_atomic(places.rules, rules_with(places, everyone))
        write(places.shared, shared, everyone)
        publish(places, shared)
        credentials.ensure_operator_key(workspace.ssh_dir)
        credentials.ensure_signing_key(workspace.signing_dir)
    return Initialized(identity, made, everyone)


def ensure(workspace: Workspace, secrets: tuple[Secret, ...], identity: sops.Identity) -> Vault:
    """The workspace's own vault, made or completed if need be.

    Completed: with names that a newer ravectl declares, and with an authority whose
    certificate ends soon. Raises RavectlError that names the key or the damage.
    """
    places = Places(workspace)
    if not os.path.lexists(places.shared) and not os.path.lexists(places.rules):
        try:
            init(workspace, secrets, identity)
        except UsageError:
            if not os.path.lexists(places.shared):  # else another ravectl made them meanwhile
                raise
    workspace.prepare()
    with files.lock(places.lock, "the workspace's secrets", wait=True):
        journal.settle(workspace.root, workspace.state)
        shared = read(places.shared, identity)
        full = complete(shared, secrets, now())
        if full != shared:
            write(places.shared, full, places.recipients())
        publish(places, full)
    return full


def complete(vault: Vault, secrets: tuple[Secret, ...], moment: datetime.datetime) -> Vault:
    """A workspace's vault with a value for each declared name that can be made."""
    for s in secrets:
        wanted = s.scope is SecretScope.WORKSPACE and s.name not in vault.values
        if wanted and s.kind in (SecretKind.PASSWORD, SecretKind.WEBHOOK, SecretKind.CA_KEY):
            vault = vault.with_value(s.name, credentials.new_value(s.kind), moment)
    return renew_authority(vault, moment)


def renew_authority(vault: Vault, moment: datetime.datetime) -> Vault:
    """The same with a certificate that the authority can still sign with.

    The same key and name once more: who trusted the old certificate need not act.
    """
    key, cert = vault.values["ca/key"], vault.values.get("ca/cert")
    if why := credentials.fault(SecretKind.CA_KEY, key):
        raise RavectlError(
            f"ca/key in {FILE} is {why}", f"take back the last good one: git checkout -- {FILE}"
        )
    if cert is not None and credentials.ca_fault(cert, key) is None:
        return vault
    return vault.with_value("ca/cert", credentials.ca_certificate(key), moment)


def publish(places: Places, shared: Vault) -> None:
    """Write out what clients read of the shared vault: the authority's certificate."""
    cert = shared.values["ca/cert"]
    files.make_private_dir(places.workspace.ca_dir)
    if not places.ca_cert.exists() or places.ca_cert.read_text() != cert:
        files.write_atomic(places.ca_cert, cert, files.PRIVATE_FILE)


# --- a machine -------------------------------------------------------------------------------


def ensure_machine(
    workspace: Workspace, folder: Path, plan: Plan, shared: Vault, identity: sops.Identity
) -> Vault:
    """The vault of the machine that is kept in `folder`, made or renewed if need be.

    The certificate is renewed when less than 30 days of it are left, or when the authority or
    the machine's name is another. Raises as `ensure` does.
    """
    places = Places(workspace)
    path = places.machine(files.make_private_dir(folder))
    with files.lock(places.lock, "the workspace's secrets", wait=True):
        known = read(path, identity) if path.exists() else Vault()
        full = complete_machine(known, plan, shared, now())
        if full != known:
            write(path, full, places.recipients(), files.PRIVATE_FILE)
    return full


def complete_machine(vault: Vault, plan: Plan, shared: Vault, moment: datetime.datetime) -> Vault:
    """A machine's vault with all that the machine needs of its own."""
    for name in ("ssh/host-key", "ingress/tls-key"):
        if name not in vault.values:
            value = credentials.new_value(plan.secret(name).kind)
            vault = vault.with_value(name, value, moment)
    key, cert = vault.values["ingress/tls-key"], vault.values.get("ingress/tls-cert")
    ca_cert, ca_key = shared.values["ca/cert"], shared.values["ca/key"]
    if cert is None or not credentials.serves(cert, key, ca_cert, plan.hostname):
        made = credentials.server_certificate(key, ca_cert, ca_key, plan.hostname)
        vault = vault.with_value("ingress/tls-cert", made, moment)
    return vault


# --- what a guest gets -----------------------------------------------------------------------


def delivery(
    plan: Plan, shared: Vault, machine: Vault, operator_keys: Iterable[str]
) -> dict[str, str]:
    """What a guest gets, by file name below /run/secrets.

    `operator_keys` are public. A former value that is still accepted is in NAME.previous, the
    time until then (seconds of the epoch) in NAME.previous-until.
    """
    found = {}
    for s in plan.delivered():
        value = _value(s, plan, shared, machine, operator_keys)
        if value is not None:
            found[s.name] = value
        if s.name in shared.previous:
            found[s.previous] = shared.previous[s.name] + "\n"
            until = parse_stamp(shared.until[s.name])
            found[f"{s.previous}-until"] = f"{int(until.timestamp())}\n"
    return found


def unreachable(plan: Plan, shared: Vault) -> list[tuple[str, str]]:
    """Whom alerts should go to and cannot, for want of a secret: what is wrong, what mends it."""
    return [
        (
            f"no alert reaches {r.kind.value}: {r.secret} is missing",
            f"ravectl secrets set {r.secret}",
        )
        for r in plan.alert_receivers
        if r.secret is not None and r.secret not in shared.values
    ]


def _value(
    s: Secret, plan: Plan, shared: Vault, machine: Vault, operator_keys: Iterable[str]
) -> str | None:
    if s.kind is SecretKind.AUTHORIZED_KEYS:
        return "".join(f"{key} {plan.operator}\n" for key in operator_keys)
    if s.kind is SecretKind.DATES:
        return _dates(plan, {**shared.changed, **machine.changed})
    source = shared.values.get(s.source or "")
    if s.kind is SecretKind.HTPASSWD:
        return None if source is None else credentials.htpasswd(plan.operator, source)
    if s.kind is SecretKind.SCRAM:
        return None if source is None else credentials.scram_verifier(s.role or "", source)
    if s.kind is SecretKind.COPY:
        return None if source is None else source.rstrip("\n") + "\n"
    held = machine if s.scope is SecretScope.INSTANCE else shared
    value = held.values.get(s.name)
    return None if value is None else value.rstrip("\n") + "\n"


def _dates(plan: Plan, changed: Mapping[str, str]) -> str:
    """When each secret was changed last, as the node exporter's textfile collector reads it."""
    metric = "rave_secret_changed_timestamp_seconds"
    rotated = {
        s.name for s in plan.secrets if s.kind not in (SecretKind.CA_KEY, SecretKind.CA_CERT)
    }
    rows = [
        f'{metric}{{secret="{name}"}} {int(parse_stamp(date).timestamp())}'
        for name, date in sorted(changed.items())
        if name in rotated
    ]
    head = f"# HELP {metric} When a secret was changed last.\n# TYPE {metric} gauge\n"
    return head + "".join(f"{row}\n" for row in rows)


def hidden(shared: Vault, machine: Vault) -> dict[str, str]:
    """The values that nobody may see: all but certificates."""
    found = {**shared.values, **machine.values}
    found |= {f"{n} (before)": v for n, v in shared.previous.items()}
    return {n: v for n, v in found.items() if not v.startswith("-----BEGIN CERTIFICATE")}


def required(plan: Plan) -> tuple[str, ...]:
    """The files that a guest cannot do without."""
    return tuple(s.name for s in plan.delivered() if s.kind is not SecretKind.GIVEN)


def declared(plan: Plan, file: str) -> Secret:
    """The secret that a delivered file belongs to."""
    return plan.secret(file.removesuffix("-until").removesuffix(".previous"))


def bundle(plan: Plan, values: Mapping[str, str], serial: int, recipient: str) -> bytes:
    """What a guest unpacks: a tar with owners and modes, encrypted for one identity."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        # also those of secrets that nobody gave: LoadCredential= of a folder wants it to be there
        names = {*values, *(s.name for s in plan.delivered())}
        folders = sorted({f for name in names for f in _folders(name)})
        for name in folders:
            tar.addfile(_member(name, "root", "root", 0o711, tarfile.DIRTYPE))
        for name, value in sorted(values.items()):
            s = declared(plan, name)
            member = _member(name, s.owner, s.group, int(s.mode, 8), tarfile.REGTYPE)
            member.size = len(value.encode())
            tar.addfile(member, io.BytesIO(value.encode()))
    return f"{MAGIC} {serial}\n".encode() + sops.seal(made.getvalue(), recipient)


def sops_bundle(plan: Plan, values: Mapping[str, str], serial: int, recipient: str) -> bytes:
    """What a NixOS guest unpacks: a sops file, encrypted for one identity.

    sops-install-secrets wants every name that its manifest declares, so what a machine does not
    have is there as well, empty; the guest's helper takes such files away again.
    """
    document: dict[str, dict[str, str]] = {}
    for name in sorted(name for s in plan.delivered() for name in s.files):
        folder, _, file = name.partition("/")
        document.setdefault(folder, {})[file] = values.get(name, "")
    return f"{MAGIC} {serial}\n".encode() + sops.encrypt(document, (recipient,)).encode()


def bundle_for(
    engine: EngineName, plan: Plan, values: Mapping[str, str], serial: int, recipient: str
) -> bytes:
    """What a guest of that engine unpacks; both forms start with MAGIC and the serial."""
    make = sops_bundle if engine is EngineName.NIX else bundle
    return make(plan, values, serial, recipient)


def _folders(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _member(name: str, owner: str, group: str, mode: int, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.uname, member.gname, member.mode, member.type = owner, group, mode, kind
    return member


def next_serial(last: int) -> int:
    """A number greater than every one that was given before; milliseconds of the epoch."""
    return max(int(time.time() * 1000), last + 1)
