"""Disks in the formats that QEMU knows."""

from __future__ import annotations

from pathlib import Path

from ravectl import command
from ravectl.model import ImageFormat


def convert(source: Path, target: Path, fmt: ImageFormat, *, compress: bool) -> None:
    """Store a disk as `fmt`; `compress` is for qcow2 (zstd)."""
    packed = ["-c", "-o", "compression_type=zstd"] if compress else []
    command.run(["qemu-img", "convert", "-O", fmt, *packed, source, target])
