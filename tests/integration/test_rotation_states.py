"""Any order of init, set, rotate, kill, boot, power cut and roll-back leaves nothing in between.

The files, sops, age, the journal and the machine's own helper (the rendered script, in a mount
namespace) are real. In place of a machine with its readers and SSH stands `StandInMachine`, which
runs commands beside us; what a real machine adds is walked through by tests/vm/test_secrets.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from ravectl import delivery, journal, lifecycle, rotate, sops, ssh, vault
from ravectl.errors import RavectlError
from ravectl.instance import Instance, Process, new_record
from ravectl.model import Activation, CheckResult, EngineName, Outcome, Report, SecretKind, Suite
from ravectl.plan import SECRETS
from ravectl.verify import VerifyTarget
from ravectl.workspace import Workspace
from tests.integration.test_rendered_tree import rendered
from tests.plans import PLAN

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")

STEPS = (
    "connected", "prepared", "staged", "activated", "applied", "proven", "verified", "committed",
    "replaced", "kept", "looked for the former", "closed",
)  # fmt: skip
EVENTS = ("ravectl dies", "a guest dies", "a guest reboots", "lines break")
SETTABLE = tuple(s.name for s in rotate.settable())
MADE = tuple(s.name for s in rotate.settable() if s.kind is not SecretKind.GIVEN)
ROTATABLE = (*MADE, "ingress/tls-key", "ssh/host-key", "ssh/operator-key")
INSIDE = (
    'mount --bind "$1" /run && mount --bind "$2" /var/lib && export CREDENTIALS_DIRECTORY="$3" '
    '&& shift 3 && exec "$@"'
)


class StandInMachine:
    """A guest without a kernel: its /run and /var/lib, its helper, and what its readers hold."""

    def __init__(self, root: Path, helper: Path, name: str) -> None:
        self.run, self.lib, self.given = root / "run", root / "lib", root / "given"
        self._held = root / "held.json"
        self.helper, self.name = helper, name
        self.running = False
        self.refusing = 0  # how many times readers will refuse to take their secrets
        for folder in (self.run, self.lib, self.given):
            folder.mkdir(parents=True)

    def do(self, argv: Sequence[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["unshare", "--mount", "sh", "-euc", INSIDE, "sh", self.run, self.lib, self.given,
             *argv],
            input=stdin, capture_output=True, check=False,
        )  # fmt: skip

    def power_off(self) -> None:
        self.running = False
        shutil.rmtree(self.run)
        self.run.mkdir()

    def boot(self) -> None:
        self.power_off()
        done = self.do(["bash", str(self.helper), "boot"])
        assert done.returncode == 0, done.stderr
        self.running = True
        self.take()

    def take(self) -> None:
        """Readers read what is there now."""
        files = self.run / "secrets.d" / (self.run / "secrets").readlink().name
        names = [p for p in files.rglob("*") if p.is_file()]
        self._held.write_text(json.dumps({str(p.relative_to(files)): p.read_text() for p in names}))

    def held(self) -> dict[str, str]:
        return dict(json.loads(self._held.read_text()))


class Line:
    """In the place of SSH."""

    def __init__(self, machine: StandInMachine) -> None:
        self.machine = machine
        self.alive = True

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0
    ) -> ssh.RemoteResult:
        if not self.alive or not self.machine.running:
            self.alive = False
            raise ConnectionError("the SSH connection broke")
        assert argv[:2] == ["sudo", "-n"], argv
        words, code, out, err = list(argv[2:]), 0, "", ""
        if words[0] in ("systemctl", "-u"):
            if self.machine.refusing:
                self.machine.refusing -= 1
                code, err = 1, "refused"
            else:
                self.machine.take()
        else:
            if words[0] == delivery.HELPER:
                words = ["bash", str(self.machine.helper), *words[1:]]
            done = self.machine.do(words, stdin)
            code, out, err = done.returncode, done.stdout.decode(), done.stderr.decode()
        return ssh.RemoteResult(" ".join(argv), code, out, err, 0.0)


class ProvenGuest(delivery.Guest):
    """A guest whose readers are asked what they hold."""

    def _wait_healthy(self) -> None:
        """There is no service to wait for."""

    def _proofs(
        self, good: delivery.Values, bad: delivery.Values | None, names: set[str]
    ) -> list[tuple[str, Callable[[], str | None]]]:
        machine = self.connection.machine  # type: ignore[attr-defined]

        def holds() -> str | None:
            held = machine.held()
            for name in names:
                told = vault.declared(PLAN, name).activation is not Activation.NONE
                if told and held.get(name) != good.files.get(name):
                    return f"{name} was not taken"
            return None

        return [("the readers", holds)]


def checked(target: VerifyTarget, suite: object, ids: object) -> Report:
    """D6 alone: everything else needs a machine."""
    instance = mock.Mock(**{"require_record.return_value": mock.Mock(plan=PLAN)})
    wrong = delivery.Guest(instance, target.connection).differing(target.delivery)
    outcome = Outcome.FAILED if wrong else Outcome.PASSED
    row = CheckResult("D6", Suite.DATA, "", outcome, "", ", ".join(wrong), "", 0.0)
    return Report(target.instance, "safe", "", (row,), 0.0, "2026-11-25T08:00:00Z")


class Rotations(RuleBasedStateMachine):
    """What a person, a crash and a power cut can do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.root = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        helper = self.root / "secrets"
        helper.write_text(rendered(PLAN).file("usr/lib/rave/secrets").content)
        self.space = Workspace(self.root / "space")
        self.space.root.mkdir()
        self.space.prepare()
        self.identity = sops.Identity(self.root / "keys.txt")
        self.machines: dict[str, StandInMachine] = {}
        for name in ("one", "two"):
            record = new_record(PLAN, EngineName.DEBIAN)
            instance = Instance(self.space.instance_dir(name), name)
            instance.folder.mkdir(parents=True)
            ports = {"22": 2222, "3002": 3002}
            instance.save(rotate.replace(record, ports=ports))
            self.machines[record.uuid] = StandInMachine(self.root / name, helper, name)
        self.on_step: Callable[[str], None] = lambda step: None
        self._stand_in()

    def _stand_in(self) -> None:
        def find(uuid: str) -> Process | None:
            machine = self.machines.get(uuid)
            return Process(1, 0.0) if machine and machine.running else None

        @contextlib.contextmanager
        def connect(instance: Instance) -> Iterator[Line]:
            machine = self.machine(instance.name)
            if not machine.running:
                raise RavectlError("it does not run", "start it")
            yield Line(machine)

        for where, name, new in (
            ("ravectl.instance", "find_process", find),
            ("ravectl.lifecycle", "connection_to", connect),
            ("ravectl.rotate", "Guest", ProvenGuest),
            ("ravectl.rotate", "reached", self.reached),
            ("ravectl.rotate.verification", "run", checked),
            ("ravectl.rotate.console", "note", lambda text: None),
            ("ravectl.rotate.console", "warn", lambda text: None),
        ):
            self.stack.enter_context(mock.patch(f"{where}.{name}", new))

    def reached(self, step: str) -> None:
        self.on_step(step)

    def machine(self, name: str) -> StandInMachine:
        return next(m for m in self.machines.values() if m.name == name)

    def instance(self, name: str) -> Instance:
        return Instance(self.space.instance_dir(name), name)

    def teardown(self) -> None:
        self.stack.close()

    # --- what is true --------------------------------------------------------------------------

    def values(self) -> dict[str, str]:
        """Every value that the files hold, by where it is."""
        found = {}
        places = vault.Places(self.space)
        paths = {"": places.shared}
        paths |= {f"{m.name}:": places.machine(self.space.instance_dir(m.name))
                  for m in self.machines.values()}  # fmt: skip
        for prefix, path in paths.items():
            if path.exists():
                read = vault.read(path, self.identity).values
                found |= {f"{prefix}{n}": v for n, v in read.items()}
        found["ssh/operator-key"] = places.operator_key.read_text()
        return found

    @invariant()
    def host_and_guests_agree(self) -> None:
        places = vault.Places(self.space)
        if not places.shared.exists():
            return
        assert journal.read(self.space.state) is None
        assert not journal.folder(self.space.state).exists()
        shared = vault.read(places.shared, self.identity)
        for machine in self.machines.values():
            instance = self.instance(machine.name)
            if not machine.running:
                continue
            own = vault.read(places.machine(instance.folder), self.identity)
            wanted = vault.delivery(PLAN, shared, own, [instance.operator_key().public])
            guest = delivery.Guest(instance, Line(machine))  # type: ignore[arg-type]
            assert guest.differing(wanted) == ()
            held = machine.held()
            for name, value in wanted.items():
                if vault.declared(PLAN, name).activation is not Activation.NONE:
                    assert held[name] == value, f"{machine.name}: {name} is another for its reader"
            state = guest.state()
            assert state.staged == 0
            left = sorted(p.name for p in (machine.run / "secrets.d").iterdir())
            assert left == [str(state.active)]

    # --- what happens ----------------------------------------------------------------------------

    @initialize()
    def init(self) -> None:
        vault.init(self.space, SECRETS, self.identity)
        self.start("one")

    @rule(name=st.sampled_from(("one", "two")))
    def start(self, name: str) -> None:
        """A start, or a restart: QEMU hands everything over anew."""
        machine, instance = self.machine(name), self.instance(name)
        machine.power_off()
        rotate.recover(self.space, self.identity)
        with lifecycle._handed_over(instance, PLAN, self.identity) as given:
            for credential, path in given.items():
                shutil.copy(path, machine.given / f"rave.{credential}")
        assert given
        assert not [p for path in given.values() for p in (path, path.parent) if p.exists()]
        machine.boot()

    @rule(name=st.sampled_from(("one", "two")))
    def power_cut(self, name: str) -> None:
        self.machine(name).power_off()

    @rule()
    def guests_reboot_by_themselves(self) -> None:
        """They get what QEMU was started with once more, and must prefer what came since."""
        for machine in self.machines.values():
            if machine.running:
                machine.boot()

    @rule(name=st.sampled_from(SETTABLE), value=st.from_regex("[A-Za-z0-9]{32}", fullmatch=True))
    def set_value(self, name: str, value: str) -> None:
        if name == "dispatcher/standard-secret":
            value = f"whsec_{value}"
        rotate.set_values(self.space, self.identity, {name: value}, "set")
        assert self.values()[name] == value

    @rule(names=st.sets(st.sampled_from(ROTATABLE), min_size=1), reboot=st.booleans())
    def rotate_names(self, names: set[str], reboot: bool) -> None:
        before = self.values()
        rotate.rotate(self.space, self.identity, rotate.Asked(tuple(sorted(names)), grace=False))
        self.assert_changed(before, names)
        if reboot:
            self.guests_reboot_by_themselves()

    @rule()
    def rotate_identity(self) -> None:
        before, old = self.values(), self.identity.recipients()
        _, recipient = rotate.rotate_identity(self.space, self.identity)
        assert self.values() == before
        assert vault.Places(self.space).recipients() == (recipient,)
        assert recipient not in old

    @rule(names=st.sets(st.sampled_from(ROTATABLE), min_size=1), times=st.sampled_from((1, 1, 9)))
    def readers_refuse(self, names: set[str], times: int) -> None:
        """Once: it is taken back. Again and again: that is done when they obey again."""
        before = self.values()
        for machine in self.machines.values():
            machine.refusing = times
        failed = False
        try:
            rotate.rotate(
                self.space, self.identity, rotate.Asked(tuple(sorted(names)), grace=False)
            )
        except RavectlError:
            failed = True
        for machine in self.machines.values():
            machine.refusing = 0
        rotate.recover(self.space, self.identity)
        if failed:
            assert self.values() == before
        else:
            self.assert_changed(before, names)

    @rule(
        step=st.sampled_from(STEPS),
        what=st.sampled_from(EVENTS),
        names=st.sets(st.sampled_from(ROTATABLE), min_size=1),
    )
    def cut_short(self, step: str, what: str, names: set[str]) -> None:
        before = self.values()
        if what == "ravectl dies":
            self.dying_at(step, names)
        else:
            self.losing_at(step, what, names)
        rotate.recover(self.space, self.identity)
        rotate.deliver(self.space, self.identity)
        if self.values() != before:
            self.assert_changed(before, names)
        if what == "ravectl dies":
            kept = STEPS.index(step) >= STEPS.index("committed")
            assert (self.values() != before) is kept

    def dying_at(self, step: str, names: set[str]) -> None:
        asked = rotate.Asked(tuple(sorted(names)), grace=False)
        self.dying(step, lambda: rotate.rotate(self.space, self.identity, asked))

    def dying(self, step: str, action: Callable[[], object]) -> None:
        """Do something in a process that is killed when it comes to a step."""
        pid = os.fork()
        if pid == 0:

            def die(reached: str) -> None:
                if reached == step:
                    os._exit(9)

            self.on_step = die
            with contextlib.suppress(BaseException):
                action()
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, f"{step} was not reached"

    def losing_at(self, step: str, what: str, names: set[str]) -> None:
        def lose(reached: str) -> None:
            if reached != step:
                return
            self.on_step = lambda step: None
            for machine in self.machines.values():
                if machine.running and what == "a guest dies":
                    machine.power_off()
                elif machine.running and what == "a guest reboots":
                    machine.boot()
            for line in lines:
                line.alive = False

        lines: list[Line] = []
        made = Line.__init__

        def remembered(line: Line, machine: StandInMachine) -> None:
            made(line, machine)
            lines.append(line)

        self.on_step = lose
        with (
            mock.patch.object(Line, "__init__", remembered),
            contextlib.suppress(RavectlError),
        ):
            rotate.rotate(
                self.space, self.identity, rotate.Asked(tuple(sorted(names)), grace=False)
            )
        self.on_step = lambda step: None

    def assert_changed(self, before: dict[str, str], names: set[str]) -> None:
        """All of these have new values, and besides them only what is signed for them."""
        after = self.values()
        changed = {n.rpartition(":")[2] for n in before if after[n] != before[n]}
        along = {"ingress/tls-cert"} if "ingress/tls-key" in names else set()
        assert changed == names | along


@pytest.mark.parametrize("what", EVENTS)
def test_cut_short_at_every_step(what: str) -> None:
    """The walk that chance need not find: each step, with what readers must be told of."""
    made = Rotations()
    try:
        made.init()
        made.start("two")
        for step in STEPS:
            for machine in made.machines.values():
                if not machine.running:
                    made.start(machine.name)
            made.cut_short(step, what, {"ccr/api-key", "postgres/exporter-password"})
            made.host_and_guests_agree()
    finally:
        made.teardown()


@pytest.mark.parametrize("step", ["staged again", "activated again", "applied again"])
def test_the_ending_of_a_change_is_cut_short_too(step: str) -> None:
    """Committed, then the machine reboots with the old values; then what brings the new dies."""
    made = Rotations()
    try:
        made.init()
        made.dying_at("committed", {"ccr/api-key", "postgres/exporter-password"})
        made.guests_reboot_by_themselves()
        made.dying(step, lambda: rotate.recover(made.space, made.identity))
        rotate.recover(made.space, made.identity)
        made.host_and_guests_agree()
        made.guests_reboot_by_themselves()
        made.host_and_guests_agree()
    finally:
        made.teardown()


def test_nothing_is_left_in_between() -> None:
    run_state_machine_as_test(
        Rotations,
        settings=settings(
            max_examples=8, stateful_step_count=8, deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )  # fmt: skip
