"""Changes of secrets: new values, brought to every running machine, proven, or taken back.

A change is decided first (pure), then written beside the old files with a journal, then
delivered, activated and proven in each running machine. Only then is it committed: one write of
the journal. Whatever fails before that is taken back; whatever is cut short is ended by the
next command, by the journal: taken back before the commit, finished after it.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import os
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ravectl import console, credentials, files, journal, lifecycle, sops, vault
from ravectl import verify as verification
from ravectl.delivery import Guest, Values, values_of
from ravectl.errors import RavectlError, UsageError
from ravectl.instance import Instance, list_instances
from ravectl.journal import Journal
from ravectl.model import InstanceState, Outcome, Plan, Secret, SecretKind, SecretScope
from ravectl.plan import SECRETS
from ravectl.vault import Vault
from ravectl.workspace import Workspace

# what a machine is held to before a change is kept: cheap, and all that secrets can break
CHECKS = frozenset({"S1", "S2", "H1", "H2", "H3", "X4", "D6"})
SSH_NAMES = ("ssh/host-key", "ssh/operator-key")
OPERATOR_KEY = "ssh/operator-key"  # not in a vault: OpenSSH reads it from its file


@dataclass(frozen=True)
class Secrets:
    """All secrets of a workspace, opened."""

    shared: Vault
    machines: Mapping[str, Vault]
    recipients: tuple[str, ...]
    operator: str = field(repr=False)  # the private SSH key


@dataclass(frozen=True)
class Done:
    """What a change came to."""

    names: tuple[str, ...]
    machines: tuple[str, ...]  # the running ones that it was brought to
    files: tuple[str, ...]  # encrypted anew, relative to the workspace
    seconds: float
    durations: Mapping[str, float]


def reached(step: str) -> None:
    """A step of a change was done; tests interrupt the process here."""
    console.detail(f"secrets: {step}")


# --- deciding (pure) -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a person asks to be rotated; without names, all that are as a matter of course."""

    names: tuple[str, ...] = ()
    older_than: datetime.timedelta | None = None
    ssh: bool = False
    everything: bool = False
    grace: bool = True  # whether a webhook's secret of before is accepted for a while


def choose(
    declared: Sequence[Secret],
    dates: Mapping[str, str],
    until: Mapping[str, str],
    asked: Asked,
    now: datetime.datetime,
) -> tuple[str, ...]:
    """The names to rotate. Pure.

    `dates` says when each was changed last, `until` how long the value before the present one is
    accepted: while it is, a rotation as a matter of course leaves that name out, because its
    sender may still use the former one. Raises UsageError for a name that is none, that cannot
    be made anew, or whose former value is still accepted.
    """
    check_names(asked.names, declared)
    chosen = list(asked.names)
    if asked.everything or (not chosen and (not asked.ssh or asked.older_than is not None)):
        chosen += [s.name for s in declared if s.in_all and _is_made(s)]
    if asked.ssh:
        chosen += SSH_NAMES
    if asked.older_than is not None:
        chosen = [n for n in chosen if n in dates and _age(dates[n], now) > asked.older_than]
    if asked.grace:
        running = {n for n, t in until.items() if vault.parse_stamp(t) > now}
        for name in running & set(asked.names):
            raise UsageError(
                f"the value of {name} before this one is accepted until {until[name]}, and its "
                "sender may still use it",
                "wait until then; or refuse both former ones at once: --no-grace",
            )
        chosen = [n for n in chosen if n not in running]
    return tuple(dict.fromkeys(chosen))


def check_names(names: Iterable[str], declared: Sequence[Secret] = SECRETS) -> None:
    """Raise UsageError for a name that is none, or that cannot be made anew. Pure."""
    for name in names:
        _require_rotatable(declared, name)


def left_out(
    names: Iterable[str], declared: Sequence[Secret] = SECRETS
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of these names, those shared ones that a rotation of all leaves as they are. Pure.

    First those that `rotate-secrets NAME` makes anew, then those that a person gave.
    """
    there = set(names)
    shared = [s for s in declared if s.scope is SecretScope.WORKSPACE and s.name in there]
    made = (s for s in shared if not s.in_all and s.kind is not SecretKind.CA_CERT)
    return (
        tuple(s.name for s in made if _is_made(s)),
        tuple(s.name for s in shared if s.kind is SecretKind.GIVEN),
    )


def _is_made(s: Secret) -> bool:
    return s.scope is not SecretScope.DERIVED and s.kind is not SecretKind.GIVEN


def _age(stamp: str, now: datetime.datetime) -> datetime.timedelta:
    return now - vault.parse_stamp(stamp)


def _require_rotatable(declared: Sequence[Secret], name: str) -> None:
    found = {s.name: s for s in declared}
    if name == OPERATOR_KEY:
        return
    if name not in found:
        raise UsageError(f"there is no secret {name!r}", "see the names: ravectl secrets list")
    if found[name].kind is SecretKind.GIVEN:
        raise UsageError(
            f"{name} is given by you, so ravectl cannot make a new one",
            f"set it, by standard input: ravectl secrets set {name}",
        )
    if found[name].kind is SecretKind.AUTHORIZED_KEYS:
        raise UsageError(f"{name} is made of the operator's key", f"rotate {OPERATOR_KEY}")
    if found[name].kind is SecretKind.DATES:
        raise UsageError(f"{name} says when the others changed", "rotate one of those")
    if found[name].scope is SecretScope.DERIVED:
        source = found[name].source
        raise UsageError(
            f"{name} is made of {source}", f"rotate that: ravectl rotate-secrets {source}"
        )


def rotated(
    before: Secrets,
    names: Iterable[str],
    secrets: Iterable[Secret],
    plans: Mapping[str, Plan],
    now: datetime.datetime,
    *,
    grace: bool = True,
) -> Secrets:
    """The same with new values for `names`, and for what is signed or derived of them."""
    wanted, shared = set(names), before.shared.without_expired(now)
    declared = {s.name: s for s in secrets}
    for name in sorted(wanted & shared.values.keys()):
        s, old = declared[name], shared.values[name]
        if s.kind is SecretKind.CA_CERT:
            continue
        shared = shared.with_value(name, credentials.new_value(s.kind), now).without_grace(name)
        if s.grace_hours and grace:
            shared = shared.with_grace(name, old, now + datetime.timedelta(hours=s.grace_hours))
    if wanted & {"ca/cert", "ca/key"}:
        shared = vault.renew_authority(shared.without("ca/cert"), now)
    machines = {}
    for machine, known in before.machines.items():
        mine = known
        for name in ("ssh/host-key", "ingress/tls-key"):
            if name in wanted:
                mine = mine.with_value(
                    name, credentials.new_value(plans[machine].secret(name).kind), now
                )
        if "ingress/tls-cert" in wanted:
            mine = mine.without("ingress/tls-cert")
        machines[machine] = vault.complete_machine(mine, plans[machine], shared, now)
    operator = before.operator
    if OPERATOR_KEY in wanted:
        operator = credentials.new_value(SecretKind.SSH_KEY)
    return replace(before, shared=shared, machines=machines, operator=operator)


def signed(secrets: Secrets, plans: Mapping[str, Plan], now: datetime.datetime) -> Secrets:
    """The same with certificates by the authority that they share: git may have brought it. Pure.

    Clients are told of that authority, so a machine with a certificate by another is refused.
    """
    for m, held in secrets.machines.items():
        key = held.values.get("ingress/tls-key")
        why = None if key is None else credentials.fault(SecretKind.TLS_KEY, key)
        if why is not None:
            raise RavectlError(
                f"ingress/tls-key of machine {m} is {why}",
                "give it another: ravectl rotate-secrets ingress/tls-key",
            )
    machines = {
        m: vault.complete_machine(held, plans[m], secrets.shared, now)
        for m, held in secrets.machines.items()
    }
    return replace(secrets, machines=machines)


def differences(before: Secrets, after: Secrets) -> tuple[str, ...]:
    """The names whose values differ, without values."""
    names = {n for n in _names(before, after) if _differs(n, before, after)}
    if before.operator != after.operator:
        names.add(OPERATOR_KEY)
    return tuple(sorted(names))


def _names(before: Secrets, after: Secrets) -> set[str]:
    vaults = [before.shared, after.shared, *before.machines.values(), *after.machines.values()]
    return {n for v in vaults for n in v.values}


def _differs(name: str, before: Secrets, after: Secrets) -> bool:
    pairs = [(before.shared, after.shared)]
    pairs += [(before.machines[m], after.machines[m]) for m in before.machines]
    return any(a.values.get(name) != b.values.get(name) for a, b in pairs)


# --- changing ------------------------------------------------------------------------------------


class Change:
    """A change of a workspace's secrets; use `change` to make one."""

    def __init__(
        self,
        workspace: Workspace,
        identity: sops.Identity,
        action: str,
        reader: sops.Identity | None = None,
    ) -> None:
        self.workspace = workspace
        self.identity = identity
        self.reader = reader or identity  # what must open the new files
        self.action = action
        self.places = vault.Places(workspace)
        self.folder = journal.folder(workspace.state)
        self.instances = {
            i.name: i
            for i in list_instances(workspace.instances_dir)
            if self.places.machine(i.folder).exists()
        }
        self.durations: dict[str, float] = {}
        self.guests: dict[str, Guest] = {}

    # --- state -----------------------------------------------------------------------------------

    def plans(self) -> dict[str, Plan]:
        """The Plan of each machine."""
        return {name: i.require_record().plan for name, i in self.instances.items()}

    def vaults(self) -> tuple[Vault, dict[str, Vault]]:
        """What all machines share, and each one's own, as they hold now."""
        machines = {
            name: vault.read(self.places.machine(i.folder), self.identity)
            for name, i in self.instances.items()
        }
        return vault.read(self.places.shared, self.identity), machines

    def load(self) -> Secrets:
        """All secrets as they hold now."""
        shared, machines = self.vaults()
        key = credentials.ensure_operator_key(self.workspace.ssh_dir)
        return Secrets(shared, machines, self.places.recipients(), key.file.read_text())

    def values(self, secrets: Secrets, name: str, operator_file: Path) -> Values:
        """What a machine has when these secrets hold."""
        key = credentials.OperatorKey(operator_file, credentials.ssh_public(secrets.operator))
        plan = self.instances[name].require_record().plan
        return values_of(plan, secrets.shared, secrets.machines[name], key)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step, then say that it was reached."""
        began = time.monotonic()
        yield
        self.durations[name] = round(time.monotonic() - began, 3)
        reached(name)

    # --- the way there ---------------------------------------------------------------------------

    def run(self, decide: Callable[[Secrets], Secrets]) -> Done:
        """Make the change that `decide` wants; take it back if it cannot be kept."""
        began = time.monotonic()
        before = self.load()
        after = decide(before)
        with contextlib.ExitStack() as stack:
            with self.step("connected"):
                self._connect(stack)
                pending = self._pending(after)
            names = differences(before, after)
            if before == after and self._agrees(after) and not any(pending.values()):
                return Done((), (), (), time.monotonic() - began, self.durations)
            with self.step("prepared"), self._nothing_left(before):
                log = self._prepare(before, after, names, pending)
            try:
                self._deliver(log, before, after)
                with self.step("committed"):
                    log = journal.commit(self.workspace.state, log)
            except BaseException as e:
                self._take_back(log, before, after, e)
                raise
            self._finish(log)
            with self.step("looked for the former"):
                after = self.load()
                for name in log.serials:
                    self._look_for_former(name, before, after)
        seconds = time.monotonic() - began
        self._audit(log, "committed", seconds)
        journal.close(self.workspace.state)
        reached("closed")
        return Done(names, tuple(log.serials), tuple(log.files.values()), seconds, self.durations)

    @contextlib.contextmanager
    def _nothing_left(self, before: Secrets) -> Iterator[None]:
        """Preparing leaves all of it, or nothing."""
        try:
            yield
        except BaseException:
            journal.close(self.workspace.state)
            with contextlib.suppress(RavectlError):
                self._pin(before)
            raise

    def _connect(self, stack: contextlib.ExitStack) -> None:
        for name, instance in self.instances.items():
            # nobody starts or stops it meanwhile
            stack.enter_context(instance.lock())
            if instance.state() is InstanceState.RUNNING:
                connection = stack.enter_context(lifecycle.connection_to(instance))
                self.guests[name] = Guest(instance, connection)

    def _pending(self, after: Secrets) -> dict[str, tuple[str, ...]]:
        """For each running machine, the files that differ from what it is to have."""
        coming = self.folder / "id_ed25519"
        return {n: g.differing(self.values(after, n, coming).files) for n, g in self.guests.items()}

    def _prepare(
        self,
        before: Secrets,
        after: Secrets,
        names: tuple[str, ...],
        pending: Mapping[str, tuple[str, ...]],
    ) -> Journal:
        journal.close(self.workspace.state)  # leftovers that no journal speaks of
        files.make_private_dir(self.folder)
        log = Journal(
            version=journal.VERSION, id=uuid.uuid4().hex, action=self.action, who=_who(),
            started=time.time(), phase=journal.PREPARED, names=names,
            files=self._write_next(before, after),
            serials={
                n: vault.next_serial(self.instances[n].require_record().serial)
                for n, changed in pending.items()
                if changed
            },
            changed={n: changed for n, changed in pending.items() if changed},
        )  # fmt: skip
        for name, serial in log.serials.items():
            self.instances[name].update(serial=serial)
        if self._next(before, log, self.reader) != after:
            raise RavectlError("what was encrypted does not read back", "run the command again")
        self._pin(before, after)
        return journal.write(self.workspace.state, log)

    def _write_next(self, before: Secrets, after: Secrets) -> dict[str, str]:
        """Write the files that differ beside the old ones; new path -> old path."""
        root, pairs = self.workspace.root, []
        if self._must_write(self.places.shared, before.shared, after.shared, after):
            pairs.append((self.folder / vault.FILE, self.places.shared))
            vault.write(pairs[-1][0], after.shared, after.recipients)
        for name, instance in self.instances.items():
            mine = before.machines[name], after.machines[name]
            if self._must_write(self.places.machine(instance.folder), *mine, after):
                pairs.append((self.folder / f"{name}.yaml", self.places.machine(instance.folder)))
                own = after.machines[name]
                vault.write(pairs[-1][0], own, after.recipients, files.PRIVATE_FILE)
        if before.recipients != after.recipients:
            pairs.append((self.folder / vault.RULES_FILE, self.places.rules))
            text = vault.rules_with(self.places, after.recipients)
            files.write_atomic(pairs[-1][0], text)
        if before.operator != after.operator:
            pairs.append((self.folder / "id_ed25519", self.places.operator_key))
            files.write_atomic(pairs[-1][0], after.operator, files.PRIVATE_FILE)
        return {str(new.relative_to(root)): str(old.relative_to(root)) for new, old in pairs}

    def _must_write(self, path: Path, old: Vault, new: Vault, after: Secrets) -> bool:
        """Whether a file gets other values, or is encrypted for others than it should be."""
        return old != new or set(vault.look(path).recipients) != set(after.recipients)

    def _agrees(self, after: Secrets) -> bool:
        """Whether all files are encrypted for whom they should be."""
        paths = [self.places.machine(i.folder) for i in self.instances.values()]
        wanted = set(after.recipients)
        return all(set(vault.look(p).recipients) == wanted for p in (self.places.shared, *paths))

    def _pin(self, *held: Secrets) -> None:
        """Let the host keys of these secrets answer, and no others."""
        for name, instance in self.instances.items():
            keys = [h.machines[name].values["ssh/host-key"] for h in held]
            instance.pin(*(credentials.ssh_public(k) for k in keys))

    def _operator_file(self, before: Secrets, after: Secrets) -> Path:
        changed = before.operator != after.operator
        return self.folder / "id_ed25519" if changed else self.places.operator_key

    def _deliver(self, log: Journal, before: Secrets, after: Secrets) -> None:
        """Bring it to every running machine and prove it there."""
        key_file = self._operator_file(before, after)
        good = {n: self.values(after, n, key_file) for n in log.serials}
        bad = {n: self.values(before, n, self.places.operator_key) for n in log.serials}
        with self.step("staged"):
            for name, serial in log.serials.items():
                guest = self.guests[name]
                guest.stage(self._bundle(guest, good[name], serial))
        with self.step("activated"):
            for name, serial in log.serials.items():
                self.guests[name].activate(serial)
        with self.step("applied"):
            for name in log.serials:
                self.guests[name].apply(log.changed[name])
        with self.step("proven"):
            for name in log.serials:
                self.guests[name].prove(good[name], bad[name], log.changed[name])
        with self.step("verified"):
            for name in log.serials:
                self._verify(name, before, after, key_file)

    def _verify(self, name: str, before: Secrets, after: Secrets, key_file: Path) -> None:
        """Hold the machine to what secrets can break, before the change is kept.

        Looked for are the new values (all, if none is new): that a former one was seen somewhere
        is a reason to rotate it, and must not be what prevents that.
        """
        guest = self.guests[name]
        authority = self.folder / "ca.crt"
        files.write_atomic(authority, after.shared.values["ca/cert"], files.PRIVATE_FILE)
        key = credentials.OperatorKey(key_file, credentials.ssh_public(after.operator))
        target = lifecycle.target_with(
            guest.instance, guest.connection, after.shared, after.machines[name], key, authority
        )
        if new := self._gone(name, after, before):
            target = replace(target, hidden=new)
        report = verification.run(target, None, set(CHECKS))
        if not report.holds:
            wrong = [r for r in report.results if r.outcome is not Outcome.PASSED]
            raise RavectlError(
                f"machine {name!r} does not hold {', '.join(r.id for r in wrong)} any more",
                "mend that first: ravectl verify",
                details="\n".join(f"{r.id}: {r.seen}" for r in wrong),
            )

    def _gone(self, name: str, these: Secrets, those: Secrets) -> dict[str, str]:
        """The values that a machine has by `these` and not by `those`."""
        held = vault.hidden(these.shared, these.machines[name])
        known = set(vault.hidden(those.shared, those.machines[name]).values())
        return {n: v for n, v in held.items() if v not in known}

    def _look_for_former(self, name: str, before: Secrets, now: Secrets) -> None:
        """Say where former values are still seen: they are refused, and tell of a leak."""
        guest, former = self.guests[name], self._gone(name, before, now)
        if not former:
            return
        target = lifecycle.target_with(
            guest.instance, guest.connection, now.shared, now.machines[name]
        )
        report = verification.run(replace(target, hidden=former), None, {"X4"})
        for r in report.results:
            if r.outcome is not Outcome.PASSED:
                console.warn(f"values from before this rotation, in machine {name!r}: {r.seen}")

    def _finish(self, log: Journal) -> None:
        """After the commit: files in their places, and the machines keep what they use."""
        with self.step("replaced"):
            journal.settle(self.workspace.root, self.workspace.state)
            now = self.load()
            vault.publish(self.places, now.shared)
            credentials.ensure_operator_key(self.workspace.ssh_dir)
            self._pin(now)
        with self.step("kept"):
            for name in log.serials:
                if name in self.guests:
                    self._keep(self.guests[name], log, now)

    def _keep(self, guest: Guest, log: Journal, now: Secrets) -> None:
        """Have a machine keep what was committed; it may have restarted since."""
        name, state = guest.instance.name, guest.state()
        if state.active == log.serials[name]:
            guest.commit(state.active)
            return
        # restarted: it has what was handed over at its start, be that new or old, or what an
        # earlier try of this very step brought
        good = self.values(now, name, self.places.operator_key)
        names, serial = log.changed[name], state.active
        if wrong := guest.differing(good.files):
            names = tuple(sorted({*names, *wrong}))
            serial = vault.next_serial(guest.instance.require_record().serial)
            guest.instance.update(serial=serial)
            guest.stage(self._bundle(guest, good, serial))
            reached("staged again")
            guest.activate(serial)
            reached("activated again")
        elif state.staged != state.active:
            return  # handed over at its start, which is when readers took it
        guest.apply(names)
        reached("applied again")
        guest.prove(good, None, names)
        guest.commit(serial)

    def _bundle(self, guest: Guest, good: Values, serial: int) -> bytes:
        """What a running machine is sent, encrypted for the identity of its start."""
        recipient = guest.instance.require_record().recipient
        if recipient is None:
            raise RavectlError(
                f"machine {guest.instance.name!r} was started by an older ravectl",
                f"start it anew: {guest.instance.verb('down')}; {guest.instance.verb('up')}",
            )
        return vault.bundle_for(guest.engine, guest.plan, good.files, serial, recipient)

    # --- the way back ----------------------------------------------------------------------------

    def _take_back(self, log: Journal, before: Secrets, after: Secrets, why: BaseException) -> None:
        """Undo what was not committed; the old values work afterwards, and that is tried."""
        console.note("taking the change back")
        try:
            self._undo(log, before, after)
        except (RavectlError, OSError) as e:
            text = e.message if isinstance(e, RavectlError) else str(e)
            console.warn(f"it could not be taken back yet ({text}): ravectl secrets deliver")
            return
        cause = why.message if isinstance(why, RavectlError) else type(why).__name__
        self._audit(log, "taken back", time.time() - log.started, cause)
        journal.close(self.workspace.state)

    def _undo(self, log: Journal, before: Secrets, after: Secrets) -> None:
        with contextlib.ExitStack() as stack:
            self._undo_in_guests(stack, log, before, after)
        reached("undone")
        self._pin(before)

    def _undo_in_guests(
        self, stack: contextlib.ExitStack, log: Journal, before: Secrets, after: Secrets
    ) -> None:
        for name, serial in log.serials.items():
            guest = self.guests.get(name)
            if guest is None or guest.instance.state() is not InstanceState.RUNNING:
                continue  # it starts with the old ones
            key_file = self._operator_file(before, after)
            good = self.values(before, name, self.places.operator_key)
            bad = self.values(after, name, key_file)
            if not guest.connection.alive:
                guest = self._reconnected(stack, guest)
            guest.discard(serial)
            guest.apply(log.changed[name])
            # what it lacked before the change is none of this change's business
            lacked = set(guest.differing(good.files))
            if not lacked:
                guest.prove(good, bad, log.changed[name])

    def _reconnected(self, stack: contextlib.ExitStack, guest: Guest) -> Guest:
        connection = stack.enter_context(lifecycle.connection_to(guest.instance))
        self.guests[guest.instance.name] = Guest(guest.instance, connection)
        return self.guests[guest.instance.name]

    # --- after an interruption -------------------------------------------------------------------

    def recover(self) -> str | None:
        """End a change that was cut short; what was done, None when there was none."""
        log = journal.read(self.workspace.state)
        if log is None:
            return None
        with contextlib.ExitStack() as stack:
            if log.phase == journal.COMMITTED:
                journal.settle(self.workspace.root, self.workspace.state)
                self._pin(self.load())
                self._connect(stack)
                self._finish(log)
                self._audit(log, "finished later", time.time() - log.started)
                outcome = "finished"
            else:
                before = self.load()
                after = self._next(before, log, self.identity)
                self._pin(before, after)
                self._connect(stack)
                self._undo(log, before, after)
                self._audit(log, "taken back", time.time() - log.started, "cut short")
                outcome = "taken back"
        journal.close(self.workspace.state)
        return f"a change that was cut short ({log.action}) is {outcome}"

    def _next(self, before: Secrets, log: Journal, identity: sops.Identity) -> Secrets:
        """The secrets that a change not yet committed would bring, as `identity` reads them."""
        targets = {old: self.workspace.root / new for new, old in log.files.items()}

        def pick(path: Path) -> Path:
            return targets.get(str(path.relative_to(self.workspace.root)), path)

        machines = {
            n: vault.read(pick(self.places.machine(i.folder)), identity)
            for n, i in self.instances.items()
        }
        shared = vault.read(pick(self.places.shared), identity)
        operator = pick(self.places.operator_key).read_text()
        recipients = vault.recipients_in(pick(self.places.rules))
        return replace(
            before, shared=shared, machines=machines, operator=operator, recipients=recipients
        )

    def _audit(self, log: Journal, outcome: str, seconds: float, cause: str = "") -> None:
        entry: dict[str, Any] = {
            "time": vault.stamp(datetime.datetime.fromtimestamp(log.started, datetime.UTC)),
            "id": log.id,
            "who": log.who,
            "action": log.action,
            "names": list(log.names),
            "machines": sorted(log.serials),
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "steps": self.durations,
        }
        if cause:
            entry["cause"] = cause
        try:
            journal.log(self.workspace.state, entry)
        except OSError as e:
            # raised, it would say that the change failed, and keep its journal for ever
            path = self.workspace.state / journal.AUDIT
            console.warn(
                f"the change is {outcome}, only its line in {path} is missing "
                f"({files.why_not(e)}): see to that: ls -ld {shlex.quote(str(path))}"
            )


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.geteuid()}"
    return f"{user}@{socket.gethostname()}"


def change(
    workspace: Workspace,
    identity: sops.Identity,
    action: str,
    decide: Callable[[Secrets, Mapping[str, Plan]], Secrets],
    reader: sops.Identity | None = None,
) -> Done:
    """Change a workspace's secrets in its files and in every running machine, or not at all.

    A change that was cut short before is ended first. `reader` is the identity that must open
    the new files, if not `identity`. Raises RavectlError with the cause when the change had to be
    taken back.
    """
    vault.ensure(workspace, SECRETS, identity)
    places = vault.Places(workspace)
    for path in (places.shared, places.rules):
        vault.require_no_link(path)
    with _held(workspace):
        _recover(workspace, identity)
        made = Change(workspace, identity, action, reader)
        plans = made.plans()
        return made.run(lambda before: signed(decide(before, plans), plans, vault.now()))


def recover(workspace: Workspace, identity: sops.Identity) -> None:
    """End a change that was cut short, if there is one."""
    workspace.prepare()
    if journal.read(workspace.state) is not None:
        with _held(workspace):
            _recover(workspace, identity)


def _recover(workspace: Workspace, identity: sops.Identity) -> None:
    if settled := Change(workspace, identity, "recover").recover():
        console.note(settled)


@contextlib.contextmanager
def _held(workspace: Workspace) -> Iterator[None]:
    """Keep others from changing secrets; say what to do when a machine goes away meanwhile."""
    lock = vault.Places(workspace).lock
    with files.lock(lock, "the workspace's secrets", wait=True):
        try:
            yield
        except (ConnectionError, TimeoutError) as e:
            pending = journal.read(workspace.state) is not None
            how = "; the change is not ended" if pending else ""
            raise RavectlError(
                f"a machine went away meanwhile: {e}{how}",
                "when it runs again, or is down: ravectl secrets deliver",
            ) from None


@dataclass(frozen=True)
class Row:
    """A file that a machine would get. `change` is same, differs, new, gone, or unknown."""

    path: str
    owner: str
    group: str
    mode: str
    size: int
    change: str


def compare(workspace: Workspace, identity: sops.Identity, instance: Instance) -> tuple[Row, ...]:
    """What the machine would get, and what of it differs from what it has if it runs."""
    places, plan = vault.Places(workspace), instance.require_record().plan
    shared = vault.read(places.shared, identity)
    machine = vault.read(places.machine(instance.folder), identity)
    wanted = vault.delivery(plan, shared, machine, [instance.operator_key().public])
    there: dict[str, str] | None = None
    differing: set[str] = set()
    if instance.state() is InstanceState.RUNNING:
        with lifecycle.connection_to(instance) as connection:
            guest = Guest(instance, connection)
            there, differing = guest.digests(), set(guest.differing(wanted))
    rows = []
    for name in sorted(wanted.keys() | (there or {}).keys()):
        s = vault.declared(plan, name)
        row = Row(
            f"/run/secrets/{name}", s.owner, s.group, s.mode, len(wanted.get(name, "").encode()),
            _compared(name, wanted, there, differing),
        )  # fmt: skip
        rows.append(row)
    return tuple(rows)


def _compared(
    name: str, wanted: Mapping[str, str], there: Mapping[str, str] | None, differing: set[str]
) -> str:
    if there is None:
        return "unknown"
    if name not in wanted:
        return "gone"
    if name not in there:
        return "new"
    return "differs" if name in differing else "same"


# --- what people ask for -------------------------------------------------------------------------


def rotate(workspace: Workspace, identity: sops.Identity, asked: Asked) -> Done:
    """Give secrets new values."""

    def decide(before: Secrets, plans: Mapping[str, Plan]) -> Secrets:
        chosen = plan_rotation(workspace, before.shared, before.machines, asked)
        return rotated(before, chosen, SECRETS, plans, vault.now(), grace=asked.grace)

    return change(workspace, identity, "rotate", decide)


def plan_rotation(
    workspace: Workspace, shared: Vault, machines: Mapping[str, Vault], asked: Asked
) -> tuple[str, ...]:
    """The names that `rotate` would take."""
    dates = _oldest([shared, *machines.values()])
    key = vault.Places(workspace).operator_key
    if key.exists():
        made = datetime.datetime.fromtimestamp(key.stat().st_mtime, datetime.UTC)
        dates[OPERATOR_KEY] = vault.stamp(made)
    return choose(SECRETS, dates, shared.until, asked, vault.now())


def _oldest(vaults: Iterable[Vault]) -> dict[str, str]:
    dates: dict[str, str] = {}
    for v in vaults:
        for name, date in v.changed.items():
            dates[name] = min(date, dates.get(name, date))
    return dates


def preview(workspace: Workspace, identity: sops.Identity, asked: Asked) -> tuple[str, ...]:
    """What `rotate` would rotate; nothing is made or changed."""
    check_names(asked.names)
    require_secrets(workspace)
    return plan_rotation(workspace, *Change(workspace, identity, "preview").vaults(), asked)


def require_secrets(workspace: Workspace) -> None:
    """Raise RavectlError where no secrets were ever made: who only looks must not make some."""
    places = vault.Places(workspace)
    if not places.shared.exists() and not places.rules.exists():
        raise RavectlError(
            f"there is no {vault.FILE} here, in {workspace.root}", "make it: ravectl init"
        )


def set_values(
    workspace: Workspace, identity: sops.Identity, values: Mapping[str, str | None], action: str
) -> Done:
    """Give secrets these values (None: take it away), of those that a person may give.

    Raises UsageError for a name or a value that cannot be; the message never quotes a value.
    """
    for name, value in values.items():
        _require_settable(name, value)

    def decide(before: Secrets, plans: Mapping[str, Plan]) -> Secrets:
        shared, now = before.shared.without_expired(vault.now()), vault.now()
        machines = dict(before.machines)
        for name, value in values.items():
            shared = _with(shared, name, value, now)
            if value is None:
                machines = {m: held.without(name) for m, held in machines.items()}
        return replace(before, shared=shared, machines=machines)

    return change(workspace, identity, action, decide)


def _with(shared: Vault, name: str, value: str | None, now: datetime.datetime) -> Vault:
    if value is None:
        return shared.without(name)
    old = shared.values.get(name)
    if old == value:
        return shared
    grace = next(s.grace_hours for s in SECRETS if s.name == name)
    # one whose time runs is what the sender has, and not what was set a moment ago
    if grace and old is not None and name not in shared.previous:
        shared = shared.with_grace(name, old, now + datetime.timedelta(hours=grace))
    return shared.with_value(name, value, now)


def settable() -> tuple[Secret, ...]:
    """The secrets that a person may give a value."""
    kinds = (SecretKind.PASSWORD, SecretKind.WEBHOOK, SecretKind.GIVEN)
    return tuple(s for s in SECRETS if s.kind in kinds and s.scope is SecretScope.WORKSPACE)


def _require_settable(name: str, value: str | None) -> None:
    found = {s.name: s for s in settable()}
    if value is None and name not in {s.name for s in SECRETS}:
        return  # of a reader that is gone
    if name not in found:
        raise UsageError(
            f"{name!r} is no secret that can be set", f"those can: {', '.join(sorted(found))}"
        )
    s = found[name]
    if value is None:
        if s.kind is not SecretKind.GIVEN:
            raise UsageError(f"{name} cannot be left out", f"ravectl rotate-secrets {name}")
    elif why := credentials.fault(s.kind, value):
        raise UsageError(f"the value for {name} is {why}", "give a better one; nothing was changed")


def deliver(workspace: Workspace, identity: sops.Identity) -> Done:
    """Bring running machines what the files hold (after git pull), and end what was cut short."""
    return change(workspace, identity, "deliver", lambda before, plans: before)


def share(
    workspace: Workspace, identity: sops.Identity, add: Iterable[str], remove: Iterable[str]
) -> Done:
    """Encrypt for other recipients, under a new data key."""

    def decide(before: Secrets, plans: Mapping[str, Plan]) -> Secrets:
        gone = set(remove)
        if unknown := gone - set(before.recipients):
            raise UsageError(
                f"{sorted(unknown)[0]!r} is no recipient", "see them: ravectl secrets recipients"
            )
        everyone = dict.fromkeys((*before.recipients, *add))
        left = tuple(r for r in everyone if r not in gone)
        if not set(left) & set(identity.recipients()):
            raise UsageError(
                "after that you could not open the secrets yourself",
                "let somebody who stays remove you: ravectl secrets recipients --remove",
            )
        return replace(before, recipients=left)

    return change(workspace, identity, "recipients", decide)


def rotate_identity(workspace: Workspace, identity: sops.Identity) -> tuple[Done, str]:
    """Encrypt for a new age identity of ours instead of the old one; both, and its recipient.

    The old identity stays in its key file, because other files may be encrypted for it.
    """
    if identity.file is None:
        raise UsageError(
            f"the age identity is in ${sops.KEY_VARIABLE}, which ravectl cannot change",
            "make the new one where that is kept, then: ravectl secrets recipients --add",
        )
    if identity.plugins():
        raise UsageError(
            f"{identity.file} holds an identity of a plugin (hardware), which ravectl cannot make",
            "make one with its tool, then: ravectl secrets recipients --add NEW --remove OLD",
        )
    ours = set(identity.recipients())
    recipient, private = sops.make_identity(identity.file)
    reader = sops.Identity(None, private)

    def decide(before: Secrets, plans: Mapping[str, Plan]) -> Secrets:
        old = [r for r in before.recipients if r in ours]
        if len(old) > 1:
            raise UsageError(
                f"{len(old)} recipients have their key in {identity.where}: {', '.join(old)}",
                "it is not known which to replace; make one with age-keygen, then: "
                "ravectl secrets recipients --add NEW --remove OLD",
            )
        others = tuple(r for r in before.recipients if r not in ours)
        return replace(before, recipients=(recipient, *others))

    try:
        return change(workspace, identity, "age", decide, reader), recipient
    except BaseException:
        # a change that is not ended yet may still need it
        if journal.read(workspace.state) is None:
            sops.forget_identity(identity.file, recipient, private)
        raise
