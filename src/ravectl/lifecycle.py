"""Up, down, reset: what takes an image, an instance, QEMU and SSH together."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ravectl import (
    command,
    console,
    credentials,
    files,
    health,
    images,
    inventory,
    journal,
    kvm,
    qemu,
    qmp,
    signing,
    sops,
    ssh,
    vault,
)
from ravectl.errors import DeadlineError, HostError, RavectlError
from ravectl.instance import (
    Instance,
    Record,
    new_record,
    send_signal,
    tail,
    wait_gone,
)
from ravectl.model import (
    HOST_ADDRESS,
    INGRESS_PORT,
    SSH_ANNOUNCEMENT,
    SSH_PORT,
    Accelerator,
    Image,
    InstanceState,
    Plan,
)
from ravectl.plan import SECRETS
from ravectl.verify import VerifyTarget, secrecy
from ravectl.workspace import Workspace

UP_SECONDS = 300.0  # on a loaded host under TCG a boot takes up to 150 s
DOWN_SECONDS = 60.0
QUIT_SECONDS = 10.0
GO_ON_SECONDS = 1.0  # what could not be written is tried again at once
MAX_PANICS = 2
KERNEL_STUCK_SECONDS = 60.0


class _NoKvmError(Exception):
    """KVM gave up while the machine booted."""


@dataclass(frozen=True)
class Started:
    """What `up` did."""

    instance: Instance
    already: bool
    accelerator: Accelerator
    first_ssh_seconds: float
    healthy_seconds: float


def up(
    workspace: Workspace,
    name: str,
    plan: Plan,
    get_image: Callable[[], Image],
    *,
    accelerator: Accelerator | None = None,
    timeout: float = UP_SECONDS,
    keep_failed: bool = False,
    identity: sops.Identity | None = None,
) -> Started:
    """Bring the instance up and wait until every service of its Plan answers.

    An instance that exists keeps its disk and image; a new one gets the image that
    `get_image` returns. `timeout` is in seconds, from QEMU's start. When it fails the machine is
    stopped again, unless `keep_failed`. Raises RavectlError with the unit that did not start
    and its last lines, HostError when this host lacks something.
    """
    workspace.prepare()
    instance = Instance(workspace.instance_dir(name), name)
    with instance.lock():
        if instance.state() is InstanceState.RUNNING:
            record = instance.require_record()
            _go_on(instance)
            _learn_host_key(instance, identity)
            return Started(instance, True, record.accelerator, 0.0, 0.0)
        command.find_tool(qemu.PROGRAM, "install it: apt-get install qemu-system-x86")
        kept = instance.record
        opener = identity or sops.find_identity(usual=workspace.identity_file)
        vault.ensure(workspace, SECRETS, opener)  # a missing key is told before a long build
        _require_memory(plan if kept is None or kept.image is None else kept.plan)
        image = _prepare(instance, plan, get_image)
        chosen = accelerator or choose_accelerator()
        deadline = time.monotonic() + timeout
        try:
            return _start(instance, image, opener, chosen, deadline, keep_failed)
        except _NoKvmError as e:
            if accelerator is not None:
                raise HostError(
                    f"KVM stopped the machine ({e})", "leave --accel out, or give --accel tcg"
                ) from None
            console.note(f"KVM stopped the machine ({e}); once more, emulated (TCG)")
            return _start(instance, image, opener, Accelerator.TCG, deadline, keep_failed)


def _go_on(instance: Instance) -> None:
    """Let a machine run on that QEMU stopped, as it does when this host's disk is full.

    Raises RavectlError when it stops it again.
    """
    with contextlib.suppress(ConnectionError, DeadlineError), instance.ask() as monitor:
        before = monitor.ask("query-status")["status"]
        if before not in ("io-error", "paused"):
            return
        monitor.ask("cont")
        time.sleep(GO_ON_SECONDS)
        status = monitor.ask("query-status")["status"]
        if status != "running":
            raise RavectlError(
                f"QEMU stopped the machine, and again when told to go on ({status})",
                f"make room on this host's disk (df -h {shlex.quote(str(instance.folder))}), "
                f"then: {instance.verb('up')}",
            )
        console.note(f"QEMU had stopped the machine ({before}); it goes on")


def _learn_host_key(instance: Instance, identity: sops.Identity | None) -> None:
    """Pin the host key that a running machine was given, unless a change of it is under way."""
    if journal.read(instance.workspace.state) is None:
        opener = identity or sops.find_identity(usual=instance.workspace.identity_file)
        own = vault.read(instance.places.machine(instance.folder), opener)
        instance.pin(credentials.ssh_public(own.values["ssh/host-key"]))


def choose_accelerator() -> Accelerator:
    """KVM where a guest runs under it, else TCG, with a line that says why."""
    verdict = kvm.probe()
    if verdict.works:
        return Accelerator.KVM
    console.note(f"no KVM, so QEMU emulates (TCG), which is slower: {verdict.reason}")
    return Accelerator.TCG


def _prepare(instance: Instance, plan: Plan, get_image: Callable[[], Image]) -> Image:
    """The image of the instance, with an overlay on it."""
    instance.require_no_lost_disk()
    record = instance.record
    if record is not None and record.image is not None and instance.overlay.exists():
        if record.plan != plan.on(record.engine):
            console.warn(
                f"instance {instance.name!r} keeps the machine that it was made from; the profile "
                f"has changed since: {instance.verb('reset')} moves to it and loses what is on the "
                "disk"
            )
        image = _image_of(instance, record.image)
        _verify_below(instance, image)
    else:
        image = get_image()
        signing.verify(instance.workspace, image)
        record = replace(record or new_record(plan, image.engine), image=None)
        # before the disk: one without a record, or under an older one, may be somebody's work
        instance.save(record)
        instance.overlay.unlink(missing_ok=True)
        _make_overlay(instance.overlay, image)
        record = Record(
            record.form, record.uuid, image.digest, image.engine, image.plan,
            record.accelerator, record.ports, None, up=False,
        )  # fmt: skip
    instance.save(record)
    images.add_root(record.uuid, instance.folder, image.digest)
    # the cache may have moved since: the overlay names its image by path
    command.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", image.format, "-b", image.disk,
         instance.overlay],
        hint="see the reason above; if another program has the disk, wait for it; else look at "
        f"it: qemu-img check {shlex.quote(str(instance.overlay))}",
    )  # fmt: skip
    return image


def _verify_below(instance: Instance, image: Image) -> None:
    """signing.verify of the image that a disk lies on, which no other can replace."""
    try:
        signing.verify(instance.workspace, image)
    except signing.AlteredError as e:
        raise signing.AlteredError(
            e.message,
            f"the disk of {instance.name!r} needs exactly this image, so first keep what is on it: "
            f"{instance.save_disk}; {e.hint}",
        ) from None


def _image_of(instance: Instance, digest: str) -> Image:
    try:
        return images.find(digest)
    except RavectlError as e:
        _require_no_other_cache(instance)
        raise RavectlError(
            f"the image {digest} of instance {instance.name!r} cannot be used: {e.message}",
            f"make it again: ravectl build; or give the instance up: {instance.verb('reset')}",
        ) from None


def _require_no_other_cache(instance: Instance) -> None:
    """RavectlError when the disk's image is where the cache was before."""
    there = None
    with contextlib.suppress(RavectlError):  # a disk that does not say
        there = images.folder_below(instance.overlay)
    if there is None or there.parent == images.store_dir() or not there.is_dir():
        return
    old, new = (shlex.quote(str(p)) for p in (there.parent, images.store_dir()))
    raise RavectlError(
        f"the image of instance {instance.name!r} is in another cache: {there}",
        f"use that: export RAVECTL_CACHE_DIR={shlex.quote(str(there.parents[1]))}; or bring it "
        f"here: mkdir -p {new}; mv {old}/{there.name} {new}",
    )


def _make_overlay(overlay: Path, image: Image) -> None:
    files.require_space(overlay, 2**30, "the disk of an instance")
    command.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image.disk, "-F", image.format,
                 overlay])  # fmt: skip
    overlay.chmod(files.PRIVATE_FILE)


def _require_memory(plan: Plan) -> None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    free = int(found[1]) // 1024 if found else 0
    need = plan.machine.memory_mb + qemu.OVERHEAD_MB
    if free < need:
        raise HostError(
            f"the machine needs {need} MB of memory, this host has {free} MB free",
            "stop something (ravectl status shows the machines), or lower machine.memory",
        )


# --- start -------------------------------------------------------------------------------------


def _start(
    instance: Instance,
    image: Image,
    identity: sops.Identity,
    accelerator: Accelerator,
    deadline: float,
    keep: bool,
) -> Started:
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(_launch(instance, image, identity, accelerator, stop=not keep))
        with console.step(f"starting {instance.name} ({accelerator.value})") as step:
            step.update("the kernel")
            first = _wait(instance, deadline, step) - began
        guard.release()
    return Started(instance, False, accelerator, first, time.monotonic() - began)


def _wait(instance: Instance, deadline: float, step: console.Step) -> float:
    """Wait until every service answers; when the first SSH command could run (monotonic)."""
    watch = _Watch(instance)
    while True:
        with _connected(instance, watch, deadline, step) as connection:
            first = time.monotonic()
            if _wait_healthy(instance, watch, connection, deadline, step):
                return first


class _Guard:
    """A process that ends QEMU if this one dies before it says `keep`."""

    def __init__(self, uuid: str, pid: int) -> None:
        read, self._write = os.pipe()
        # what it verifies before it kills: that the number still runs this machine
        script = (
            'read -r word; [ "$word" = keep ] && exit; '
            'grep -q -- "$1" "/proc/$2/cmdline" && kill -KILL "$2"'
        )
        argv = ["sh", "-c", script, "rave-guard", uuid, str(pid)]
        try:
            self._process = command.spawn(argv, stdin=read)
        finally:
            os.close(read)

    def release(self) -> None:
        """Let QEMU live on without us."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._write, b"keep\n")
        self._end()

    def abandon(self) -> None:
        """End the guard after QEMU was ended."""
        self._end()

    def _end(self) -> None:
        if self._write >= 0:
            os.close(self._write)
            self._write = -1
        command.wait_quietly(self._process, 5.0)


@contextlib.contextmanager
def _handed_over(
    instance: Instance, plan: Plan, identity: sops.Identity
) -> Iterator[dict[str, Path]]:
    """What the machine gets at its start, as files in memory, gone when QEMU has read them.

    Nobody changes secrets meanwhile: a rotation either comes before, or finds the machine
    running.
    """
    workspace = instance.workspace
    shared = vault.ensure(workspace, SECRETS, identity)
    machine = vault.ensure_machine(workspace, instance.folder, plan, shared, identity)
    lock = files.lock(instance.places.lock, "the workspace's secrets", wait=True)
    with lock, files.in_memory() as folder:
        shared = vault.read(instance.places.shared, identity)
        machine = vault.read(instance.places.machine(instance.folder), identity)
        private, recipient = sops.new_identity()
        serial = vault.next_serial(instance.require_record().serial)
        values = vault.delivery(plan, shared, machine, [instance.operator_key().public])
        for text, remedy in vault.unreachable(plan, shared):
            console.warn(f"{text}; {remedy}")
        handed = {"age-identity": private.encode() + b"\n"}
        engine = instance.require_record().engine
        handed["bundle"] = vault.bundle_for(engine, plan, values, serial, recipient)
        instance.pin(credentials.ssh_public(machine.values["ssh/host-key"]))
        instance.update(serial=serial, recipient=recipient)
        for name, content in handed.items():
            files.write_atomic(folder / name, content, files.PRIVATE_FILE)
        yield {name: folder / name for name in handed}


def _receiver(plan: Plan) -> qemu.Receiver | None:
    """Where the journal goes, as this host reaches it."""
    target = plan.logs.forward
    if target is None:
        return None
    here = target.host == HOST_ADDRESS
    return qemu.Receiver(qemu.LOOPBACK if here else target.host, target.port)


@contextlib.contextmanager
def _launch(
    instance: Instance,
    image: Image,
    identity: sops.Identity,
    accelerator: Accelerator,
    *,
    stop: bool,
) -> Iterator[_Guard]:
    """A running QEMU; on an exception it is ended again (if `stop`)."""
    if instance.console_log.exists():
        instance.console_log.replace(instance.folder / "console.previous.log")
    instance.console_log.touch(files.PRIVATE_FILE)
    instance.qemu_log.unlink(missing_ok=True)
    with (
        _handed_over(instance, image.plan, identity) as given,
        qmp.listen(instance.monitor) as monitor,
    ):
        record = instance.update(accelerator=accelerator, started=time.time(), up=True)
        launch = qemu.Launch(
            name=instance.name,
            uuid=record.uuid,
            accelerator=accelerator,
            memory_mb=image.plan.machine.memory_mb,
            cpus=image.plan.machine.cpus,
            kernel=image.kernel,
            initrd=image.initrd,
            cmdline=image.cmdline,
            overlay=instance.overlay,
            console_log=instance.console_log,
            credentials=given,
            egress=image.plan.network.egress,
            receiver=_receiver(image.plan),
            monitor_fd=monitor.fileno(),
        )
        process = command.spawn(
            qemu.arguments(launch), log=instance.qemu_log, pass_fds=[monitor.fileno()]
        )
        guard = _Guard(record.uuid, process.pid)
        try:
            _let_go(instance, image.plan, process)
        except BaseException:
            command.kill_group(process)
            instance.update(up=False)
            guard.abandon()
            raise
    try:
        yield guard
    except BaseException as e:
        if stop or isinstance(e, _NoKvmError):
            command.kill_group(process)
            instance.update(up=False)
            guard.abandon()
        else:
            guard.release()
            console.note(f"the machine was left as it is; end it: {instance.verb('down')}")
        raise


def _let_go(instance: Instance, plan: Plan, process: command.Process) -> None:
    """Forward the ports of the paused machine and start its processors."""
    try:
        with instance.ask() as monitor:
            ports = _forward(instance, plan, monitor)
            instance.update(ports={str(guest): host for guest, host in ports.items()})
            monitor.ask("cont")
    except (ConnectionError, DeadlineError):
        ended = _qemu_ended(instance, process.poll())
        if instance.require_record().accelerator is Accelerator.KVM:
            raise _NoKvmError(tail(instance.qemu_log, 1) or ended.message) from None
        raise ended from None


def _forward(instance: Instance, plan: Plan, monitor: qmp.Monitor) -> dict[int, int]:
    demanded = {SSH_PORT: plan.network.ssh_host_port, INGRESS_PORT: plan.network.https_host_port}
    last = {int(k): v for k, v in instance.require_record().ports.items()}
    for wish in qemu.wishes(demanded, last):
        for port in wish.candidates():
            # QEMU binds it or refuses: nobody can take it in between
            if not monitor.human(qemu.forward(port, wish.guest_port)).strip():
                break
        else:
            raise HostError(
                f"port {wish.demanded} of this host is taken{_holder(wish.demanded)}",
                "end that program, or change network.ssh_port / https_port in the profile",
            )
    return qemu.forwarded(monitor.human("info usernet"))


def _holder(port: int | None) -> str:
    """Who listens on a port, as far as `ss` may tell."""
    with contextlib.suppress(RavectlError):
        out = command.run(["ss", "-Hltnp", f"sport = :{port}"], check=False).stdout
        if found := re.search(r'users:\(\("([^"]+)",pid=(\d+)', out):
            return f" by {found[1]} (process {found[2]})"
    return ""


def _qemu_ended(instance: Instance, code: int | None) -> RavectlError:
    how = "does not answer" if code is None else f"ended by itself (exit {code})"
    text = tail(instance.qemu_log, 10) or instance.console_tail(10)
    return RavectlError(
        f"QEMU {how} while the machine was started",
        "see what this host lacks: ravectl doctor",
        details=text,
    )


# --- wait --------------------------------------------------------------------------------------


class _Watch:
    """Looks whether the booting machine still lives; cheap enough to call often."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._next = 0.0
        self._panics = 0
        self._announced = False
        self._kvm = instance.require_record().accelerator is Accelerator.KVM

    def look(self) -> bool:
        """Whether the guest said that SSH listens. Raises RavectlError when it died."""
        if time.monotonic() < self._next:
            return self._announced
        self._next = time.monotonic() + 0.2
        self._check_panics()
        self._check_process()
        self._announced = self._instance.console_has(SSH_ANNOUNCEMENT)
        return self._announced

    def restarted(self) -> bool:
        """Whether the kernel panicked since the last look. Raises RavectlError when too often."""
        before = self._panics
        self._check_panics()
        return self._panics > before

    def _check_panics(self) -> None:
        panics = self._instance.panics()
        if panics >= MAX_PANICS:
            raise RavectlError(
                f"the machine's kernel panicked {panics} times while it started",
                "try again; if it stays so, build the image anew: ravectl gc; ravectl build",
                details=self._instance.panic_text(),
            )
        if panics > self._panics:
            console.note("the machine's kernel panicked and restarts itself; waiting on")
        self._panics = panics

    def _check_process(self) -> None:
        try:
            with self._instance.ask() as monitor:
                status = monitor.ask("query-status")["status"]
        except (ConnectionError, DeadlineError):
            if self._kvm:
                raise _NoKvmError("QEMU ended") from None
            raise _qemu_ended(self._instance, None) from None
        if status in ("internal-error", "guest-panicked", "io-error"):
            if self._kvm and status == "internal-error":
                raise _NoKvmError("internal-error")
            raise RavectlError(
                f"QEMU stopped the machine ({status})",
                f"see the space on this host's disk, then: {self._instance.verb('up')}",
                details=self._instance.console_tail(15),
            )


@contextlib.contextmanager
def _connected(
    instance: Instance, watch: _Watch, deadline: float, step: console.Step
) -> Iterator[ssh.Connection]:
    """An SSH connection to the booting machine."""
    target = instance.target()
    step.update("the SSH server")
    try:
        connection = ssh.connect_when_ready(target, deadline, watch.look)
    except DeadlineError as e:
        raise DeadlineError(
            "the machine's SSH server did not answer in time",
            f"look at its console: {instance.verb('console')}; on a loaded host: --timeout",
            details=instance.console_tail(15) or e.details,
        ) from None
    with connection:
        yield connection


def _wait_healthy(
    instance: Instance,
    watch: _Watch,
    connection: ssh.Connection,
    deadline: float,
    step: console.Step,
) -> bool:
    """Wait until every service of the Plan answers, by one stream from the guest.

    False when its kernel panicked meanwhile and starts again. Raises RavectlError when a service
    failed or the time is over.
    """
    record = instance.require_record()
    last = health.Progress(("every service",), ())

    def take(line: str) -> bool:
        nonlocal last
        progress = health.parse(line)
        if progress is None:
            return True
        last = progress
        step.update(", ".join(progress.waiting))
        return bool(progress.waiting) and not progress.failed

    text = health.script(record.plan, record.engine)
    broken = False
    try:
        connection.stream(f"bash -c {shlex.quote(text)}", take, deadline=deadline)
    except DeadlineError:
        pass
    except ConnectionError:
        # a channel that could not be opened in what was left of the time is no break
        broken = time.monotonic() < deadline
    if last.healthy:
        return True
    if not last.failed and watch.restarted():
        return False
    if broken:
        raise RavectlError(
            "the connection to the machine broke while its services started",
            f"look at its console: {instance.verb('console')}",
            details=instance.console_tail(15),
        )
    raise _unhealthy(instance, connection, last)


def _unhealthy(
    instance: Instance, connection: ssh.Connection, last: health.Progress
) -> RavectlError:
    record = instance.require_record()
    name = (last.failed or last.waiting)[0]
    unit = next((s.unit[record.engine.value] for s in record.plan.services if s.name == name), name)
    lines = ""
    with contextlib.suppress(RavectlError, ConnectionError):
        lines = connection.run(
            ["sudo", "journalctl", "--no-pager", "--output=cat", "--lines=12", "--unit", unit],
            timeout=20,
        ).stdout
    others = len(last.failed or last.waiting) - 1
    more = f" (and {others} more)" if others > 0 else ""
    how = "failed" if last.failed else "did not answer in time"
    kind: type[RavectlError] = RavectlError if last.failed else DeadlineError
    return kind(
        f"service {name} ({unit}) {how}{more}",
        f"look closer: {instance.verb('up --keep-failed')}, then {instance.verb('logs ' + name)}",
        details=lines or instance.console_tail(12),
    )


# --- down, reset -------------------------------------------------------------------------------


def down(instance: Instance, timeout: float = DOWN_SECONDS) -> str:
    """Stop the instance: ask the guest, then QEMU, then the kernel; return which of them did it.

    `timeout` is in seconds, for the guest. The disk is consistent each way: its file system
    has a journal, and QEMU writes out what it holds before it quits.
    """
    with instance.lock():
        record = instance.require_record()
        if instance.process() is None:
            instance.update(up=False)
            return "it was not running"
        with console.step(f"stopping {instance.name}") as step:
            how = _stop(instance, record.uuid, timeout, step)
        instance.update(up=False)
        return how


def _stop(instance: Instance, uuid: str, timeout: float, step: console.Step) -> str:
    why = "the guest did not react"
    with contextlib.suppress(RavectlError, ConnectionError):
        with instance.ask() as monitor:
            status = monitor.ask("query-status")["status"]
            running = status == "running"
            if running:
                monitor.ask("system_powerdown")
            else:
                why = f"the guest could not react, for QEMU had stopped it ({status})"
        step.update("the guest shuts down")
        if running and wait_gone(uuid, timeout):
            return "the guest shut down"
    with contextlib.suppress(RavectlError, ConnectionError):
        step.update("QEMU")
        with instance.ask() as monitor:
            monitor.ask("quit")
        if wait_gone(uuid, QUIT_SECONDS):
            return f"{why}; QEMU quit"
    for number in (signal.SIGTERM, signal.SIGKILL):
        step.update(number.name)
        send_signal(uuid, number)
        if wait_gone(uuid, QUIT_SECONDS):
            return f"QEMU did not react; ended by {number.name}"
    raise RavectlError("QEMU does not end, not even by SIGKILL", "restart this host")


def reset(instance: Instance) -> None:
    """Throw the instance's disk away; its name, ports and credentials stay.

    The next `up` makes a new disk on the image that the profile then gives.
    """
    down(instance)
    with instance.lock():
        instance.update(image=None)
        instance.overlay.unlink(missing_ok=True)
        instance.console_log.unlink(missing_ok=True)


# --- verify ------------------------------------------------------------------------------------


@contextlib.contextmanager
def connection_to(instance: Instance) -> Iterator[ssh.Connection]:
    """An SSH connection to a running instance, closed after; RavectlError when it has none."""
    state = instance.state()
    if state is not InstanceState.RUNNING:
        raise RavectlError(
            f"instance {instance.name!r} is {state.value}", f"start it: {instance.verb('up')}"
        )
    try:
        connection = connect_again(instance)
    except OSError as e:
        raise RavectlError(
            f"the machine does not answer: {e}", f"see {instance.verb('status')}"
        ) from None
    with connection:
        yield connection


def connect_again(instance: Instance) -> ssh.Connection:
    """A connection to a running instance; ConnectionError, or RavectlError when it refuses."""
    try:
        return ssh.Connection(instance.target())
    except ssh.RefusedError:
        # a rotation that was cut short may have left it with the new key
        coming = instance.next_operator_key()
        if coming is None:
            raise
        return ssh.Connection(instance.target(coming))


@contextlib.contextmanager
def verify_target(
    instance: Instance, identity: sops.Identity | None = None
) -> Iterator[VerifyTarget]:
    """What `verify` needs of a running instance, with a connection that is closed after."""
    with connection_to(instance) as connection:
        yield target_over(instance, connection, identity)


def target_over(
    instance: Instance, connection: ssh.Connection, identity: sops.Identity | None = None
) -> VerifyTarget:
    """The same over a connection that there is, with the secrets as the files hold them now."""
    opener = identity or sops.find_identity(usual=instance.workspace.identity_file)
    places = instance.places
    shared = vault.read(places.shared, opener)
    machine = vault.read(places.machine(instance.folder), opener)
    target = target_with(instance, connection, shared, machine)
    digest = instance.require_record().image
    if digest is None:
        return target
    image = images.find(digest)
    held = image.folder / inventory.NAME
    return replace(
        target,
        disks={**target.disks, secrecy.IMAGE: image.disk},
        inventory=held if held.exists() else None,
    )


def target_with(
    instance: Instance,
    connection: ssh.Connection,
    shared: vault.Vault,
    machine: vault.Vault,
    operator: credentials.OperatorKey | None = None,
    ca_cert: Path | None = None,
) -> VerifyTarget:
    """A running instance as `verify` takes it, held against these secrets."""
    record = instance.require_record()
    key = operator or instance.operator_key()
    return VerifyTarget(
        instance=instance.name,
        plan=record.plan,
        engine=record.engine,
        image_digest=record.image or "",
        endpoint=instance.endpoint(),
        connection=connection,
        ca_cert=ca_cert or instance.places.ca_cert,
        ingress_user=record.plan.operator,
        ingress_password=shared.values["ingress/password"],
        router_key=shared.values["ccr/api-key"],
        delivery=vault.delivery(record.plan, shared, machine, [key.public]),
        hidden=vault.hidden(shared, machine),
        disks={secrecy.DISK: instance.overlay},
        host_started=instance.host_started(),
    )
