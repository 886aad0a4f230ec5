"""Each module imports only lower layers. Without this test layers rot."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "ravectl"

ROWS = [
    {"errors", "console", "model", "__init__"},
    {"command", "files"},
    {
        "profile",
        "plan",
        "render",
        "engines",
        "sops",
        "journal",
        "credentials",
        "qemu",
        "qmp",
        "ssh",
        "kvm",
        "workspace",
        "health",
        "imagelock",
        "inventory",
        "relay",
    },
    {"vault", "signing"},
    {"images", "instance", "verify", "doctor"},
    {"lifecycle", "building", "delivery", "dispatcher"},
    {"reconnect"},
    {"rotate", "audit", "watch", "logs", "feed"},
    {"cli", "__main__"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
# within row 0 the order is errors < model < console
ALLOWED_WITHIN = {("console", "errors"), ("command", "errors"), ("__main__", "cli")}


def noun(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("ravectl.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.name)
def test_imports_only_lower_rows(path: Path) -> None:
    me = noun(path)
    assert me in ROW, f"{me} stands in no row: give it one in the layer table"
    for other in imported(path):
        if other == me or other.startswith("__version__") or (me, other) in ALLOWED_WITHIN:
            continue
        assert other in ROW, f"{path} imports unknown {other}"
        assert ROW[other] < ROW[me], f"{me} (row {ROW[me]}) imports {other} (row {ROW[other]})"


def test_only_command_starts_processes() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.name != "command.py":
            text = path.read_text()
            assert "import subprocess" not in text, path
            assert "os.system(" not in text, path
