"""The rendered flake in the hands of the real Nix, in a store of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ravectl import images, profile
from ravectl.model import AptSource, Plan
from ravectl.plan import make_plan
from ravectl.render import write_tree

STANDINS = Path(__file__).resolve().parent / "nix"
OVERRIDES = [
    word
    for name in ("nixpkgs", "sops-nix")
    for word in ("--override-input", name, f"path:{STANDINS / name}")
]
CONFIGURATION = """\
experimental-features = nix-command flakes
sandbox = false
build-users-group =
substituters =
"""


def environment(folder: Path, configuration: str = CONFIGURATION) -> dict[str, str]:
    """Variables by which Nix uses a store in `folder` and nothing of this host's."""
    conf = folder / "conf"
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "nix.conf").write_text(configuration)
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return {
        **os.environ,
        "NIX_STORE_DIR": str(folder / "store"),
        "NIX_STATE_DIR": str(folder / "var"),
        "NIX_LOG_DIR": str(folder / "log"),
        "NIX_CONF_DIR": str(conf),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HOME": str(home),
    }


def shipped() -> tuple[Plan, ...]:
    """The Plans of the shipped profiles."""
    return tuple(make_plan(**profile.load(n, None).plan_arguments()) for n in profile.shipped())


def on_both() -> Plan:
    """The Plan of full-pipe as far as both engines can have it: with a package source of Grafana,
    and without Tempo, of which there is none for Debian."""
    said = profile.load("full-pipe", None).plan_arguments()
    limits = {name: row for name, row in said["limits"].items() if name != "tempo"}
    source = AptSource("https://apt.example.org/ stable main", "a key")
    return make_plan(**{**said, "profile": "on-both", "limits": limits, "grafana_source": source})


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rave-nix.")


@functools.cache
def flake() -> Path:
    """A folder with the flake of the shipped profiles, and of what both engines can have."""
    folder = Path(_scratch().name) / "flake"
    folder.mkdir()
    write_tree(images.render_nixos((*shipped(), on_both())), folder)
    return folder


def instantiate(*words: str) -> subprocess.CompletedProcess[str]:
    """Run nix-instantiate."""
    return subprocess.run(
        ["nix-instantiate", *words],
        env=environment(Path(_scratch().name) / "nix"),
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def values(hostname: str) -> dict[str, Any]:
    """Everything that a machine of the flake sets, as Nix evaluates it."""
    return evaluate(flake() / "modules" / hostname)


def evaluate(module: Path) -> dict[str, Any]:
    """Everything that a module sets."""
    done = instantiate(
        "--eval", "--strict", "--json", str(STANDINS / "evaluate.nix"), "--arg", "machine",
        str(module),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))
