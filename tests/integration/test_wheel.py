"""The wheel works in an empty environment and from another folder: its data is inside it."""

from __future__ import annotations

import json
import site
import subprocess
import sys
import venv
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def test_the_wheel_carries_everything(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", wheels, TOP],
        check=True,
    )  # fmt: skip
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels.iterdir()],
        check=True,
    )
    # the dependencies, as installed from the lock; the checkout itself must not be found
    packages = next(home.glob("lib/python*/site-packages"))
    for path in Path(site.getsitepackages()[0]).iterdir():
        if "ravectl" not in path.name and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)

    def ravectl(*words: str) -> str:
        return subprocess.run(
            [home / "bin" / "ravectl", *words],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    where = subprocess.run(
        [python, "-c", "import ravectl; print(ravectl.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert str(home) in where
    assert ravectl("--version").startswith("ravectl ")
    assert json.loads(ravectl("plan", "--safe", "--json"))["profile"] == "safe"
    assert json.loads(ravectl("verify", "--schema"))["type"] == "object"
    ravectl("render", "--safe", "tree")
    code = tmp_path / "tree" / "opt" / "rave-dispatcher" / "rave_dispatcher"
    assert (code / "adapters" / "console" / "static" / "uPlot.iife.min.js").stat().st_size > 50_000
    assert "listen 3002 ssl" in (tmp_path / "tree" / "etc" / "nginx" / "nginx.conf").read_text()
