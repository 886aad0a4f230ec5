"""The hexagon's directions: the domain knows nothing, the application the domain, adapters both."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "rave_dispatcher"
MAY = {
    "domain": {"domain"},
    "application": {"domain", "application"},
    # what adapters are made with: the configuration's values, and the version
    "adapters": {"domain", "application", "adapters", "config", "__version__"},
    "config": {"domain"},
}
# libraries without I/O that the inside may use; all others belong to adapters
PURE = {"domain": {"jsonpath"}, "application": {"pydantic_core"}}
# of the standard library, what would make the inside depend on the outside
OUTSIDE = {"sqlite3", "socket", "subprocess", "os", "time", "random", "pathlib", "logging", "http"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def ring(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_point_inwards(path: Path) -> None:
    me = ring(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top != "ravectl", f"{path} imports ravectl"
        if top == "rave_dispatcher" and me in MAY:
            assert rest.split(".")[0] in MAY[me], f"{me} imports {name}"
        elif me in PURE:
            assert top in PURE[me] | (set(sys.stdlib_module_names) - OUTSIDE), f"{me}: {name}"


def test_of_the_dispatcher_ravectl_imports_what_a_rule_is() -> None:
    """A profile's rules are held against the reader that they will have; nothing else is shared."""
    for path in (SOURCE.parent / "ravectl").rglob("*.py"):
        found = [n for n in imported(path) if n.startswith("rave_dispatcher")]
        allowed = ("rave_dispatcher.domain.rules.", "rave_dispatcher.domain.tasks.AgentType")
        assert path.name == "profile.py" or not found, path
        assert all(n.startswith(allowed) for n in found), path


def test_what_is_locked_for_the_machine_is_what_is_tested() -> None:
    """The dispatcher's own lock names the versions that this environment has."""
    lock = (ROOT / "requirements-dispatcher.lock").read_text()
    rows = re.findall(r"^([a-z0-9-]+)==(\S+) \\$", lock, re.M)
    assert len(rows) > 20
    assert {n: v for n, v in rows if version(n) != v} == {}
    assert "://" not in lock


def test_the_lock_holds_all_that_the_dispatcher_needs() -> None:
    extra = re.search(
        r"^dispatcher = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert extra is not None
    needed = re.findall(r'"([a-z-]+)', extra[1])
    lock = (ROOT / "requirements-dispatcher.lock").read_text()
    assert [n for n in needed if f"\n{n}==" not in lock] == []
