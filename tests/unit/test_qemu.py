"""QEMU's command line: no secret in it, every name fits, and ports are read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from ravectl import qemu
from ravectl.model import Accelerator

HANDED_OVER = ("age-identity", "bundle")


def launch(**changes: object) -> qemu.Launch:
    values = {
        "name": "default", "uuid": "0" * 36, "accelerator": Accelerator.TCG, "memory_mb": 2048,
        "cpus": 2, "kernel": Path("/i/vmlinuz"), "initrd": Path("/i/initrd"), "cmdline": "quiet",
        "overlay": Path("/w/disk.qcow2"), "console_log": Path("/w/console.log"),
        "credentials": {n: Path("/w") / n for n in HANDED_OVER}, "egress": False,
        "receiver": None, "monitor_fd": 7, **changes,
    }  # fmt: skip
    return qemu.Launch(**values)  # type: ignore[arg-type]


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_credentials_are_files_and_their_names_fit() -> None:
    words = qemu.arguments(launch())
    given = [w for i, w in enumerate(words) if words[i - 1] == "-fw_cfg"]
    assert len(given) == len(HANDED_OVER)
    for word in given:
        label, path = (part.partition("=")[2] for part in word.split(","))
        assert label.startswith("opt/io.systemd.credentials/rave.")
        assert len(label) <= qemu.MAX_FW_CFG_NAME
        assert path.startswith("/w/")


def test_a_credential_name_that_would_be_cut_is_refused() -> None:
    with pytest.raises(AssertionError):
        qemu.arguments(launch(credentials={"x" * 40: Path("/w/x")}))


def test_commas_in_paths_are_doubled() -> None:
    words = qemu.arguments(launch(overlay=Path("/a,b/disk.qcow2"), console_log=Path("/a,b/c")))
    assert "filename=/a,,b/disk.qcow2," in " ".join(words)
    assert "path=/a,,b/c," in " ".join(words)


def test_the_way_out_is_closed_unless_opened() -> None:
    assert value_of(qemu.arguments(launch()), "-netdev").endswith("restrict=on")
    assert value_of(qemu.arguments(launch(egress=True)), "-netdev").endswith("restrict=off")


def test_each_accelerator_has_its_processor() -> None:
    assert value_of(qemu.arguments(launch()), "-accel").startswith("tcg")
    words = qemu.arguments(launch(accelerator=Accelerator.KVM))
    assert (value_of(words, "-accel"), value_of(words, "-cpu")) == ("kvm", "host")


def test_it_starts_paused_and_opens_nothing() -> None:
    words = qemu.arguments(launch())
    assert "-S" in words
    assert "hostfwd" not in " ".join(words)
    assert "-nodefaults" in words


# what QEMU 7.2 prints for `info usernet`
USERNET = """\
Hub -1 (uplink):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]  14       127.0.0.1  3002       10.0.2.15  3002     0     0
  TCP[HOST_FORWARD]  13       127.0.0.1 35421       10.0.2.15    22     0     0
  TCP[ESTABLISHED]   15       127.0.0.1 35421       10.0.2.15    22     0     0
  UDP[236 sec]       16       10.0.2.15 33333         1.1.1.1    53     0     0
"""


def test_forwarded_ports_are_read_back() -> None:
    assert qemu.forwarded(USERNET) == {3002: 3002, 22: 35421}
    assert qemu.forwarded("") == {}


def test_who_demands_a_port_gets_it_or_nothing() -> None:
    ssh, https = qemu.wishes({22: 4000, 3002: None}, {22: 2299, 3002: 3999})
    assert ssh.candidates() == (4000,)
    assert https.candidates() == (3999, 0), "that of last time, else any"
    ssh, https = qemu.wishes({}, {})
    assert (ssh.candidates(), https.candidates()) == ((2222, 0), (3002, 0))


def test_a_closed_machine_reaches_its_receiver_and_nothing_else() -> None:
    receiver = qemu.Receiver("logs.example.org", 19532)
    words = qemu.arguments(launch(receiver=receiver))
    netdev = value_of(words, "-netdev")
    assert ",restrict=on," in netdev
    assert netdev.count("guestfwd=") == 1
    assert ",guestfwd=tcp:10.0.2.100:19532-cmd:" in netdev
    assert netdev.endswith("relay.py logs.example.org 19532")
    assert "spawn=allow" in value_of(words, "-sandbox")


def test_only_a_relay_lets_qemu_start_programs() -> None:
    receiver = qemu.Receiver("logs.example.org", 19532)
    for values in ({}, {"egress": True, "receiver": receiver}):
        words = qemu.arguments(launch(**values))
        assert "spawn=deny" in value_of(words, "-sandbox")
        assert "guestfwd" not in value_of(words, "-netdev")
