"""Records what the probes of `verify` collect from a running machine, for the unit tests.

    python -m tests.record WORKSPACE     with a healthy SAFE machine running in it

Run it again when a probe asks for something else. What it writes holds no secret.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ravectl import lifecycle, workspace
from ravectl.instance import Instance
from ravectl.verify.checks import CHECKS

RECORDED = Path(__file__).parent / "unit" / "recorded"


def main() -> None:
    space = workspace.find(override=Path(sys.argv[1]))
    RECORDED.mkdir(exist_ok=True)
    with lifecycle.verify_target(Instance(space.instance_dir("default"), "default")) as target:
        for probe in {c.probe.name: c.probe for c in CHECKS}.values():
            text = probe.collect(target, time.monotonic() + probe.seconds)
            (RECORDED / f"{probe.name}.txt").write_text(text)


if __name__ == "__main__":
    main()
