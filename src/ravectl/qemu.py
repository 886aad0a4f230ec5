"""QEMU's command line, decided from plain values. Pure; lifecycle.py runs it.

The machine type is `pc`: its HPET and ACPI timer let the guest's kernel calibrate its clock
whatever else the host does. microvm starts a second sooner and has neither; on a loaded host
18 of 40 boots hung for ever while the kernel calibrated against the PIT (docs/adr/0002).
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ravectl.model import INGRESS_PORT, RELAY_ADDRESS, SSH_PORT, Accelerator

PROGRAM = "qemu-system-x86_64"
LOOPBACK = "127.0.0.1"
NETDEV = "uplink"
OVERHEAD_MB = 300  # QEMU beside the guest's memory: measured 150-250 with TCG's code cache
CREDENTIAL_PREFIX = "opt/io.systemd.credentials/"
MAX_FW_CFG_NAME = 55  # FW_CFG_MAX_FILE_PATH less its end


@dataclass(frozen=True)
class Receiver:
    """A TCP port outside that a closed machine reaches at RELAY_ADDRESS, under the same number."""

    host: str
    port: int


@dataclass(frozen=True)
class Launch:
    """Everything that a QEMU process is started with."""

    name: str
    uuid: str
    accelerator: Accelerator
    memory_mb: int
    cpus: int
    kernel: Path
    initrd: Path
    cmdline: str
    overlay: Path
    console_log: Path
    credentials: Mapping[str, Path]  # secret name -> file, mode 0600
    egress: bool
    receiver: Receiver | None  # the one thing that a machine without a way out reaches
    monitor_fd: int  # a listening unix socket


def arguments(launch: Launch) -> list[str]:
    """The command line. It holds no secret: credentials go in as files.

    The machine is made paused and without forwarded ports: `forwards` adds those, then it is
    let go.
    """
    return [
        PROGRAM,
        "-name", f"rave-{launch.name}",
        "-uuid", launch.uuid,
        "-no-user-config", "-nodefaults", "-display", "none",
        "-machine", "pc,usb=off,vmport=off,i8042=off,dump-guest-core=off",
        *_accelerator(launch.accelerator),
        "-smp", str(launch.cpus),
        "-m", str(launch.memory_mb),
        "-kernel", str(launch.kernel),
        "-initrd", str(launch.initrd),
        "-append", launch.cmdline,
        "-blockdev",
        f"driver=file,node-name=file0,filename={_quoted(launch.overlay)},discard=unmap",
        "-blockdev", "driver=qcow2,node-name=disk0,file=file0,discard=unmap",
        "-device", "virtio-blk-pci,drive=disk0",
        "-netdev", _uplink(launch),
        "-device", f"virtio-net-pci,netdev={NETDEV}",
        "-device", "virtio-rng-pci",
        "-chardev", f"file,id=console,path={_quoted(launch.console_log)},append=on",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=monitor,fd={launch.monitor_fd},server=on,wait=off",
        "-mon", "chardev=monitor,mode=control",
        "-sandbox", _sandbox(launch),
        *_credentials(launch.credentials),
        "-S",
    ]  # fmt: skip


def _uplink(launch: Launch) -> str:
    words = f"user,id={NETDEV},restrict={'off' if launch.egress else 'on'}"
    if launch.egress or launch.receiver is None:
        return words
    to = launch.receiver
    relay = shlex.join([sys.executable, "-I", "-S", relay_file(), to.host, str(to.port)])
    return f"{words},guestfwd=tcp:{RELAY_ADDRESS}:{to.port}-cmd:{relay.replace(',', ',,')}"


def _sandbox(launch: Launch) -> str:
    # QEMU's guestfwd opens a connection in one way only: it starts a program, in a session of
    # its own (setsid is among what elevateprivileges denies). No program gets more rights than
    # QEMU has: seccomp comes with no_new_privs.
    relays = launch.receiver is not None and not launch.egress
    word = "allow" if relays else "deny"
    return f"on,obsolete=deny,elevateprivileges={word},spawn={word},resourcecontrol=deny"


def relay_file() -> str:
    """The program that QEMU starts for a connection to the receiver."""
    return str(Path(__file__).with_name("relay.py"))


def _accelerator(accelerator: Accelerator) -> list[str]:
    if accelerator is Accelerator.KVM:
        return ["-accel", "kvm", "-cpu", "host"]
    # One thread for each virtual CPU: with a single one the boot takes three times as long.
    # Without 5-level page tables (la57) an emulated page walk is a fifth shorter: services used
    # 25 to 35 % less CPU. Without erms and fsrm copying goes by words: emulated, `rep movsb`
    # moves single bytes. Without cx16 the guest's allocator takes a lock instead of cmpxchg16b,
    # after which QEMU 7.2 has remains of other registers in EFLAGS: an interrupt right then and the
    # kernel panicked (RAX in EFLAGS, the operands in RAX to RDX; about one boot in sixty).
    features = "max,la57=off,erms=off,fsrm=off,svm=off,cx16=off"
    return ["-accel", "tcg,thread=multi", "-cpu", features]


def _credentials(files: Mapping[str, Path]) -> list[str]:
    words = []
    for name, path in sorted(files.items()):
        label = f"{CREDENTIAL_PREFIX}{credential_name(name)}"
        assert len(label) <= MAX_FW_CFG_NAME, label
        words += ["-fw_cfg", f"name={label},file={_quoted(path)}"]
    return words


def credential_name(secret: str) -> str:
    """The systemd credential by which the guest gets a secret: rave.ingress.tls-key."""
    return f"rave.{secret.replace('/', '.')}"


def files_of(word: str) -> list[Path]:
    """The files that an option list of QEMU's command line names."""
    found = re.findall(r"(?:^|,)filename=((?:[^,]|,,)+)", word)
    return [Path(text.replace(",,", ",")) for text in found]


def _quoted(path: Path) -> str:
    """A path as a value in an option list, where a comma is doubled."""
    return str(path).replace(",", ",,")


# --- forwarded ports --------------------------------------------------------------------------


def forward(host_port: int, guest_port: int) -> str:
    """The monitor command that forwards a port of loopback; 0 lets the kernel choose one."""
    return f"hostfwd_add {NETDEV} tcp:{LOOPBACK}:{host_port}-:{guest_port}"


def forwarded(usernet: str) -> dict[int, int]:
    """Guest port -> host port, from what `info usernet` prints."""
    pattern = rf"^\s*TCP\[HOST_FORWARD\]\s+\d+\s+{re.escape(LOOPBACK)}\s+(\d+)\s+\S+\s+(\d+)\s"
    return {int(m[2]): int(m[1]) for m in re.finditer(pattern, usernet, re.M)}


@dataclass(frozen=True)
class Wish:
    """A port to be forwarded: who demands a number gets it or an error, who prefers may not."""

    guest_port: int
    demanded: int | None
    preferred: int

    def candidates(self) -> tuple[int, ...]:
        """The host ports to try, in order."""
        return (self.demanded,) if self.demanded is not None else (self.preferred, 0)


def wishes(demanded: Mapping[int, int | None], last_time: Mapping[int, int]) -> tuple[Wish, ...]:
    """What to forward: ports that the profile names, else those of last time, else the usual."""
    usual = {SSH_PORT: 2222, INGRESS_PORT: INGRESS_PORT}
    return tuple(
        Wish(guest, demanded.get(guest), last_time.get(guest, default))
        for guest, default in usual.items()
    )
