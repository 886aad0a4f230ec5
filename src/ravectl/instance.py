"""An instance: its folder, its record, and the QEMU process that may belong to it.

A process is ours when it runs QEMU under our uid with this instance's UUID (128 random bits)
on its command line. No pid is kept anywhere, so none can go stale: a reboot of the host or a
number that now belongs to another process changes nothing. A copy of a workspace has the same
UUID: what runs is told by the disk that it has open.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import shlex
import signal
import uuid as uuids
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from ravectl import credentials, files, journal, qemu, qmp, ssh, vault
from ravectl.errors import RavectlError
from ravectl.model import (
    INGRESS_PORT,
    SSH_PORT,
    Accelerator,
    Endpoint,
    EngineName,
    InstanceState,
    Plan,
    form_of,
    from_json,
    to_json,
)
from ravectl.workspace import Workspace

DEFAULT_NAME = "default"
PINS_FILE = "ssh_host_keys.pub"
POWERED_OFF = "reboot: Power down"  # the kernel's last words at an orderly end
PANIC = "Kernel panic - not syncing"
# of terminals (ECMA-48): CSI, character sets, OSC
_ESCAPES = re.compile(r"\x1b(\[[0-9;?!]*[A-Za-z]|[()].|\][^\x07\x1b\n]*(\x07|\x1b\\)?)")


@dataclass(frozen=True)
class Record:
    """What is remembered of an instance. `image` is None after a reset."""

    form: str  # FORM of the ravectl that wrote it
    uuid: str
    image: str | None
    engine: EngineName
    plan: Plan
    accelerator: Accelerator
    ports: dict[str, int]  # guest port -> host port, as of the last start
    started: float | None  # epoch seconds of the last start
    up: bool  # started, and not brought down since
    serial: int = 0  # of the last bundle of secrets that was made for it
    recipient: str | None = None  # whom bundles are encrypted for since its last start


FORM = form_of(Record)


def _names_a_machine(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a record, of whatever form, says which QEMU is its."""
    return isinstance(value, dict) and isinstance(value.get("uuid"), str)


@dataclass(frozen=True)
class Process:
    """A verified QEMU of ours."""

    pid: int
    started: float  # epoch seconds


class Instance:
    """The instance `name`, kept in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.overlay = folder / "disk.qcow2"
        self.console_log = folder / "console.log"
        self.qemu_log = folder / "qemu.log"
        self.monitor = folder / "qmp.sock"
        self._record_file = folder / "instance.json"

    @property
    def flag(self) -> str:
        """What a command line needs so that this instance is meant."""
        return "" if self.name == DEFAULT_NAME else f" --name {self.name}"

    def verb(self, verb: str) -> str:
        """The command line of a verb for this instance."""
        return f"ravectl {verb}{self.flag}"

    @property
    def record(self) -> Record | None:
        """What is remembered; None for a new instance. Raises RavectlError when damaged."""
        if not files.is_there(self._record_file):
            return None
        try:
            value = json.loads(self._record_file.read_text())
        except (ValueError, RecursionError, FileNotFoundError, IsADirectoryError) as e:
            raise self._unusable(f"{self._record_file} cannot be read: {e}") from None
        if not isinstance(value, dict) or value.get("form") != FORM:
            uuid = value["uuid"] if _names_a_machine(value) else None
            text = f"instance {self.name!r} was made by another version of ravectl"
            raise self._unusable(text, "use that version again, or ", uuid)
        try:
            return from_json(Record, value)
        except (KeyError, ValueError, TypeError, AttributeError) as e:
            uuid = value["uuid"] if _names_a_machine(value) else None
            text = f"the record of instance {self.name!r} is damaged: {e}"
            raise self._unusable(text, uuid=uuid) from None

    def _unusable(self, text: str, before: str = "", uuid: str | None = None) -> RavectlError:
        running = find_process(uuid) if uuid else find_process_on(self.overlay)
        end = f"end it first (kill {running.pid}); " if running else ""
        return RavectlError(
            text,
            f"{before}{end}to keep what is on its disk: {self.save_disk}; then throw the instance "
            f"away: rm -r {shlex.quote(str(self.folder))}",
        )

    @property
    def save_disk(self) -> str:
        """The command that keeps what is on its disk: a copy of the file would need its image."""
        return f"qemu-img convert -O qcow2 {shlex.quote(str(self.overlay))} ELSEWHERE.qcow2"

    def require_no_lost_disk(self) -> None:
        """RavectlError when there is a disk, and no record to say whose it is and of what image."""
        if self.record is None and files.is_there(self.overlay):
            raise self._unusable(
                f"instance {self.name!r} has a disk, and its record, instance.json, is gone"
            )

    def save(self, record: Record) -> Record:
        """Remember `record`."""
        files.write_json(self._record_file, to_json(record), files.PRIVATE_FILE)
        return record

    def update(self, **changes: object) -> Record:
        """Change fields of the record and remember it."""
        record = self.require_record()
        return self.save(replace(record, **changes))  # type: ignore[arg-type]

    def require_record(self) -> Record:
        """The record; RavectlError when there is none."""
        record = self.record
        if record is None:
            raise RavectlError(
                f"there is no instance {self.name!r} here", f"make it: {self.verb('up')}"
            )
        return record

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other ravectls off; RavectlError when one is at work on this instance."""
        files.make_private_dir(self.folder)
        with files.lock(self.folder / "lock", f"instance {self.name!r}"):
            yield

    # --- the process ---------------------------------------------------------------------------

    def process(self) -> Process | None:
        """Our QEMU if it runs, found by its UUID; RavectlError when it runs on another's disk."""
        record = self.record
        found = None if record is None else find_process(record.uuid)
        other = None if found is None else _other_folder(found.pid, self.overlay)
        if other is not None:
            place = shlex.quote(str(Workspace(other.parents[2]).root))
            raise RavectlError(
                f"the machine of {self.folder} runs in {other}: one is a copy of the other",
                f"stop it there: ravectl down --workspace {place} --name {other.name}; or have "
                f"none here, and lose this disk: rm -r {shlex.quote(str(self.folder))}",
            )
        return found

    def state(self) -> InstanceState:
        """What is true now: by the process, and by how the last one ended. Raises as process."""
        record = self.record
        if record is None:
            return InstanceState.ABSENT
        if self.process():
            return InstanceState.RUNNING
        if record.up and POWERED_OFF not in self.console_tail(5):
            return InstanceState.CRASHED
        return InstanceState.STOPPED

    def ask(self) -> qmp.Monitor:
        """A connection to QEMU's monitor; raises ConnectionError when it does not run."""
        try:
            return qmp.Monitor(self.monitor)
        except FileNotFoundError:
            raise ConnectionError("QEMU's monitor is not there") from None

    def host_started(self) -> float | None:
        """Epoch seconds at which QEMU started, None when it does not run."""
        process = self.process()
        return process.started if process else None

    # --- reaching it -----------------------------------------------------------------------------

    def endpoint(self) -> Endpoint:
        """Where it can be reached. Raises RavectlError when it was never started."""
        record = self.require_record()
        try:
            ssh_port, https_port = (record.ports[str(p)] for p in (SSH_PORT, INGRESS_PORT))
        except KeyError:
            raise RavectlError(
                f"instance {self.name!r} was never started", f"start it: {self.verb('up')}"
            ) from None
        return Endpoint(ssh_port, https_port, record.plan.operator)

    @property
    def workspace(self) -> Workspace:
        """The workspace that it belongs to."""
        return Workspace(self.folder.parents[2])

    @property
    def places(self) -> vault.Places:
        """Where its workspace keeps secrets."""
        return vault.Places(self.workspace)

    def operator_key(self) -> credentials.OperatorKey:
        """The key by which its workspace's operator logs in."""
        return credentials.ensure_operator_key(self.workspace.ssh_dir)

    def pins(self) -> tuple[str, ...]:
        """The public host keys that may answer; RavectlError when it was never started."""
        try:
            lines = (self.folder / PINS_FILE).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        found = tuple(line for line in lines if credentials.is_ssh_public(line))
        if not found:
            raise RavectlError(
                f"the host key of instance {self.name!r} is not known",
                f"{self.verb('up')} learns it",
            )
        return found

    def pin(self, *keys: str) -> None:
        """Let these public host keys answer, and no other."""
        text = "".join(f"{key}\n" for key in dict.fromkeys(keys))
        path = self.folder / PINS_FILE
        if not path.exists() or path.read_bytes() != text.encode():
            files.write_atomic(path, text, files.PRIVATE_FILE)

    def next_operator_key(self) -> Path | None:
        """The key that a rotation under way brings; the machine may know it already."""
        path = journal.folder(self.workspace.state) / "id_ed25519"
        return path if path.exists() else None

    def target(self, key_file: Path | None = None) -> ssh.Target:
        """How SSH reaches it, with the host keys that may answer."""
        endpoint = self.endpoint()
        return ssh.Target(
            port=endpoint.ssh_port,
            user=endpoint.operator,
            key_file=key_file or self.operator_key().file,
            host_keys=self.pins(),
            flag=self.flag,
        )

    def known_hosts(self) -> Path:
        """A known_hosts file with its pinned key, for OpenSSH's client."""
        path = self.folder / "known_hosts"
        text = self.target().known_hosts
        if not path.exists() or path.read_text() != text:
            files.write_atomic(path, text, files.PRIVATE_FILE)
        return path

    # --- its console -----------------------------------------------------------------------------

    def console_tail(self, lines: int) -> str:
        """The last lines of its serial console, without control characters."""
        return tail(self.console_log, lines)

    def panics(self) -> int:
        """How often its kernel panicked since the last start."""
        return _read_end(self.console_log, 2**20).count(PANIC)

    def panic_text(self) -> str:
        """What the console said around the last panic."""
        clean = tail(self.console_log, 10_000).splitlines()
        at = max((i for i, line in enumerate(clean) if PANIC in line), default=0)
        return "\n".join(clean[max(0, at - 8) : at + 4])

    def console_has(self, text: str) -> bool:
        """Whether its console said `text` since the last start, be it a panic's."""
        return text in _read_end(self.console_log, 2**20).rpartition(PANIC)[2]


def new_record(plan: Plan, engine: EngineName) -> Record:
    """The record of an instance that was never started."""
    return Record(FORM, str(uuids.uuid4()), None, engine, plan, Accelerator.TCG, {}, None, up=False)


def list_instances(folder: Path) -> list[Instance]:
    """Every instance that has a record, by name."""
    if not folder.is_dir():
        return []
    found = [Instance(p, p.name) for p in sorted(folder.iterdir()) if p.is_dir()]
    return [i for i in found if files.is_there(i.folder / "instance.json")]


def find_process(uuid: str) -> Process | None:
    """The QEMU of this user that was started with `-uuid uuid`."""
    return _find(_has_uuid(uuid))


def find_process_on(disk: Path) -> Process | None:
    """The QEMU of this user that has `disk`, for when its uuid is not known."""
    real = disk.resolve()

    def holds(words: list[bytes]) -> bool:
        named = (f for word in words for f in qemu.files_of(os.fsdecode(word)))
        return any(f.resolve() == real for f in named)

    return _find(holds)


def _other_folder(pid: int, overlay: Path) -> Path | None:
    """The folder of another instance whose disk a QEMU has open instead of `overlay`.

    None also when nobody can say: it may just be starting, or its disk was removed meanwhile.
    """
    other = None
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                file = fd.readlink()
                if file.name != overlay.name:
                    continue
                # the file and not its name, for a workspace may be moved while its machine runs
                if overlay.exists() and fd.samefile(overlay):
                    return None
                # an image of the store has a disk of this name, too
                if (file.parent / "instance.json").exists():
                    other = file.parent
    return other


def _has_uuid(uuid: str) -> Callable[[list[bytes]], bool]:
    return lambda words: (b"-uuid", uuid.encode()) in itertools.pairwise(words)


def _find(holds: Callable[[list[bytes]], bool]) -> Process | None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _is_ours(int(entry.name), holds):
            with contextlib.suppress(OSError, ValueError):
                return Process(int(entry.name), _start_time(int(entry.name)))
    return None


def _is_ours(pid: int, holds: Callable[[list[bytes]], bool]) -> bool:
    with contextlib.suppress(OSError):
        folder = Path(f"/proc/{pid}")
        words = (folder / "cmdline").read_bytes().split(b"\0")
        if os.path.basename(words[0]) != qemu.PROGRAM.encode():  # noqa: PTH119 - bytes
            return False
        return holds(words) and folder.stat().st_uid == os.geteuid()
    return False


def _start_time(pid: int) -> float:
    """Epoch seconds at which a process started: proc_pid_stat(5), field 22, and btime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ValueError("it has ended")
    boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.M)
    assert boot is not None
    return int(boot[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def wait_gone(uuid: str, timeout: float) -> bool:
    """Wait up to `timeout` seconds for our QEMU to end; whether it did."""
    with _pidfd(uuid) as fd:
        if fd is None:
            return True
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))


def send_signal(uuid: str, number: signal.Signals) -> None:
    """Signal our QEMU, and surely no other process; nothing happens when it is gone."""
    with _pidfd(uuid) as fd:
        if fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)


@contextlib.contextmanager
def _pidfd(uuid: str) -> Iterator[int | None]:
    """A handle on our QEMU: what is verified after it was opened stays true of it."""
    process = find_process(uuid)
    fd = None
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(process.pid)
    try:
        yield fd if process and fd is not None and _is_ours(process.pid, _has_uuid(uuid)) else None
    finally:
        if fd is not None:
            os.close(fd)


def tail(path: Path, lines: int) -> str:
    """The last lines of a log, without control characters."""
    text = _ESCAPES.sub("", _read_end(path, 2**18))
    clean = "".join(c for c in text if c in "\n\t" or c >= " ")
    return "\n".join([line for line in clean.splitlines() if line.strip()][-lines:])


def _read_end(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - limit))
            return f.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
