"""Does KVM work here? Found out by running a guest, because /dev/kvm opening proves nothing.

Some hosts (sandboxes, nested virtualisation done badly) let us create a VM and even emulate
simple instructions, and fail at the first one that needs the real processor. QEMU then stops
in `internal-error` and sits there for ever. So a tiny guest in long mode does x87 and SSE
arithmetic and halts; only a halt *after* the right results counts.

`probe` runs that guest in a process of its own (`python -m ravectl.kvm` prints the verdict as
JSON), so that neither a hang nor a crash in it reaches the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import struct
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ravectl import command
from ravectl.errors import DeadlineError, RavectlError
from ravectl.model import from_json

DEVICE = "/dev/kvm"
TCG_REMEDY = "nothing to do: QEMU emulates (TCG), which is slower; KVM needs another host"

# Request numbers from <linux/kvm.h>, as _IO/_IOR/_IOW spell them on x86-64.
_GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_GET_SUPPORTED_CPUID = 0xC008AE05
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_SET_TSS_ADDR = 0xAE47
_RUN = 0xAE80
_SET_REGS = 0x4090AE82
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_SET_CPUID2 = 0x4008AE90

_API_VERSION = 12  # the only one since Linux 2.6.22
_CPUID_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES
_CPUID_ENTRY_BYTES = 40
_TSS_ADDR = 0x7FFFD000  # three pages that Intel needs; below 2 GiB, as fcntl.ioctl takes an int

EXIT_HLT = 5
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTERNAL_ERROR = 17
_EXIT_NAMES = {
    0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 4: "DEBUG", EXIT_HLT: "HLT", 6: "MMIO",
    EXIT_SHUTDOWN: "SHUTDOWN", EXIT_FAIL_ENTRY: "FAIL_ENTRY", 10: "INTR",
    EXIT_INTERNAL_ERROR: "INTERNAL_ERROR",
}  # fmt: skip

# Guest-physical layout; one 2 MiB page maps it onto itself.
_PML4, _PDPT, _PD, _CODE, _DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
_MEMORY_BYTES = 0x10000

# mov, cpuid and hlt are of no use as evidence: a KVM that cannot run a guest emulates them.
# Nothing emulates fld1 and paddd. rdi points at two 32-bit words of memory.
FPU_AND_SSE = bytes.fromhex(
    "dbe3"  # fninit
    "d9e8"  # fld1
    "db1f"  # fistp dword [rdi]
    "b815000000"  # mov eax, 21
    "660f6ec0"  # movd xmm0, eax
    "660ffec0"  # paddd xmm0, xmm0
    "660f7e4704"  # movd [rdi+4], xmm0
)
HLT = b"\xf4"
EXPECTED = (1, 42)


@dataclass(frozen=True)
class Verdict:
    """Whether a guest runs under KVM, why (one line), and what would mend it."""

    works: bool
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class GuestExit:
    """Why KVM_RUN returned: the exit reason, its detail (a suberror), the two result words."""

    reason: int
    detail: int
    results: tuple[int, int]


def probe(timeout: float = 5.0) -> Verdict:
    """Whether KVM works on this host; never raises, and gives up after `timeout` seconds.

    The environment's RAVECTL_KVM_DEVICE replaces /dev/kvm.
    """
    # -P: a folder `ravectl` or a file `json.py` where the person stands is not ours to run
    return _ask([sys.executable, "-P", "-m", "ravectl.kvm"], timeout)


def judge(device: str, end: GuestExit) -> Verdict:
    """The verdict on how the guest ended. Pure."""
    if end.reason == EXIT_HLT and end.results == EXPECTED:
        return Verdict(True, f"{device} runs guests")
    what = f"KVM_EXIT_{_EXIT_NAMES.get(end.reason, end.reason)}"
    if end.reason == EXIT_INTERNAL_ERROR:
        what += f", suberror {end.detail}"
    elif end.reason == EXIT_FAIL_ENTRY:
        what += f", hardware reason {end.detail:#x}"
    elif end.reason == EXIT_HLT:
        what += f", but it computed {end.results[0]} and {end.results[1]}"
    return Verdict(False, f"{device} opens but cannot run a guest ({what})", TCG_REMEDY)


def judge_error(device: str, code: int) -> Verdict:
    """The verdict on a system call that failed with errno `code`. Pure."""
    if code == errno.EPERM:  # not the file's mode: a device rule of the container
        return Verdict(
            False,
            f"this container may not open {device}",
            f"start the container with the device (docker run --device {device})",
        )
    if code == errno.EACCES:
        return Verdict(
            False,
            f"no right to open {device}: add yourself to group kvm",
            'sudo usermod --append --groups kvm "$USER"   # then log in again',
        )
    if code in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return Verdict(
            False,
            f"no {device}",
            "sudo modprobe --all kvm kvm_intel || sudo modprobe --all kvm kvm_amd"
            "   # after enabling virtualisation in the firmware",
        )
    if code == errno.ENOTTY:
        return Verdict(False, f"{device} is not a KVM device", TCG_REMEDY)
    return Verdict(False, f"{device} cannot run a guest ({os.strerror(code).lower()})", TCG_REMEDY)


def run_guest(device: str, code: bytes) -> GuestExit:
    """Run `code` in a new long-mode guest until KVM gives control back.

    rdi holds the address of the result words. Raises OSError. It can hang or, on a broken
    KVM, worse: call `probe` unless this process is expendable.
    """
    with contextlib.ExitStack() as stack:
        kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, kvm)
        if fcntl.ioctl(kvm, _GET_API_VERSION, 0) != _API_VERSION:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
        stack.callback(os.close, vm)
        fcntl.ioctl(vm, _SET_TSS_ADDR, _TSS_ADDR)
        memory = mmap.mmap(-1, _MEMORY_BYTES)
        _fill(memory, code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(
            vm, _SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, _MEMORY_BYTES, address)
        )
        vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
        stack.callback(os.close, vcpu)
        _set_cpuid(kvm, vcpu)
        _set_registers(vcpu)
        shared = mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
        stack.callback(shared.close)
        fcntl.ioctl(vcpu, _RUN, 0)
        # struct kvm_run: exit_reason at 8; the union begins at 32, and both of its members
        # that we read begin with their code (32 bits of a suberror, 64 of a failed entry)
        (reason,) = struct.unpack_from("=I", shared, 8)
        (detail,) = struct.unpack_from("=Q" if reason == EXIT_FAIL_ENTRY else "=I", shared, 32)
        first, second = struct.unpack_from("=II", memory, _DATA)
        return GuestExit(reason, detail, (first, second))


def _fill(memory: mmap.mmap, code: bytes) -> None:
    """Page tables that map the first 2 MiB onto themselves, and the code."""
    present_writable, large = 0b11, 1 << 7
    struct.pack_into("=Q", memory, _PML4, _PDPT | present_writable)
    struct.pack_into("=Q", memory, _PDPT, _PD | present_writable)
    struct.pack_into("=Q", memory, _PD, 0 | present_writable | large)
    memory[_CODE : _CODE + len(code)] = code


def _set_cpuid(kvm: int, vcpu: int) -> None:
    """Give the guest every processor feature that KVM offers, as QEMU's `-cpu host` does."""
    table = bytearray(8 + _CPUID_ENTRIES * _CPUID_ENTRY_BYTES)
    struct.pack_into("=I", table, 0, _CPUID_ENTRIES)
    fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, table)
    fcntl.ioctl(vcpu, _SET_CPUID2, table)


class _Segment(ctypes.Structure):
    """struct kvm_segment."""

    _fields_ = [
        ("base", ctypes.c_uint64), ("limit", ctypes.c_uint32), ("selector", ctypes.c_uint16),
        ("type", ctypes.c_uint8), ("present", ctypes.c_uint8), ("dpl", ctypes.c_uint8),
        ("db", ctypes.c_uint8), ("s", ctypes.c_uint8), ("l", ctypes.c_uint8),
        ("g", ctypes.c_uint8), ("avl", ctypes.c_uint8), ("unusable", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
    ]  # fmt: skip


class _SpecialRegisters(ctypes.Structure):
    """struct kvm_sregs."""

    _fields_ = [
        *((name, _Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt_and_idt", ctypes.c_uint64 * 4),
        *((name, ctypes.c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")),
        ("apic_base", ctypes.c_uint64), ("interrupt_bitmap", ctypes.c_uint64 * 4),
    ]  # fmt: skip


def _set_registers(vcpu: int) -> None:
    """64-bit mode with paging and SSE on, about to execute the code."""
    special = _SpecialRegisters()
    fcntl.ioctl(vcpu, _GET_SREGS, special)
    flat = {"base": 0, "limit": 0xFFFFFFFF, "present": 1, "s": 1, "g": 1}
    special.cs = _Segment(**flat, selector=0x08, type=0b1011, l=1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(special, name, _Segment(**flat, selector=0x10, type=0b0011, db=1))
    special.cr0 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1 << 0  # PG NE ET MP PE
    special.cr3 = _PML4
    special.cr4 = 1 << 10 | 1 << 9 | 1 << 5  # OSXMMEXCPT OSFXSR PAE
    special.efer = 1 << 10 | 1 << 8  # LMA LME
    fcntl.ioctl(vcpu, _SET_SREGS, special)
    # struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp, r8 to r15, rip rflags (bit 1 is fixed)
    fcntl.ioctl(vcpu, _SET_REGS, struct.pack("=18Q", *[0] * 5, _DATA, *[0] * 10, _CODE, 2))


def _ask(argv: Sequence[str], timeout: float) -> Verdict:
    """The verdict that the command `argv` prints, or one on how it went wrong."""
    try:
        result = command.run(argv, timeout=timeout, check=False)
    except DeadlineError:
        return Verdict(False, f"a guest under KVM did not end within {timeout:.0f} s", TCG_REMEDY)
    except RavectlError as e:
        return Verdict(False, f"KVM could not be probed: {e.message}", e.hint)
    except OSError as e:
        return Verdict(False, f"KVM could not be probed: {e.strerror or e}", TCG_REMEDY)
    if result.returncode == 0:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            return from_json(Verdict, json.loads(result.stdout))
    return Verdict(False, f"the KVM probe {_how_it_ended(result)}", TCG_REMEDY)


def _how_it_ended(result: command.Result) -> str:
    last = (result.stderr.strip().splitlines() or [""])[-1]
    how = f"was ended by signal {-result.returncode}" if result.returncode < 0 else "failed"
    return f"{how}: {last}" if last else how


def _examine(device: str) -> Verdict:
    """The verdict, found in this process: see run_guest for what that risks."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return Verdict(False, "not an x86-64 host", TCG_REMEDY)
    try:
        return judge(device, run_guest(device, FPU_AND_SSE + HLT))
    except OSError as e:
        # EPERM or ENOENT of a later step is no matter of the device's permissions
        if e.filename is None and e.errno in (errno.EPERM, errno.EACCES, errno.ENOENT):
            return judge_error(device, errno.EIO)
        return judge_error(device, e.errno or errno.EIO)


def main() -> None:
    """Print this process's verdict as JSON."""
    device = os.environ.get("RAVECTL_KVM_DEVICE") or DEVICE
    print(json.dumps(asdict(_examine(str(Path(device))))))


if __name__ == "__main__":
    main()
