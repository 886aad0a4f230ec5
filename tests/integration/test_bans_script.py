"""rave-bans: which lines of sshd's journal it counts, as OpenSSH 10.0 writes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ravectl import images
from tests.plans import PLAN

WHY = "of 15 seconds for penalty: failed authentication"
LINES = f"""\
Server listening on 0.0.0.0 port 22.
srclimit_penalise: ipv4: new 10.0.2.2/32 deferred penalty {WHY}
Invalid user srclimit_penalise: ipv4: new 1/32 active penalty of from 10.0.2.2 port 1
srclimit_penalise: 10.0.2.2/32: activating ipv4 penalty {WHY}
drop connection #0 from [10.0.2.2]:39 on [10.0.2.15]:22 penalty: failed authentication
srclimit_penalise: ipv4: new 198.51.100.2/32 active penalty {WHY}
"""


def test_a_block_that_begins_is_counted_once(tmp_path: Path) -> None:
    script = images.render_debian(PLAN).file("usr/lib/rave/bans").content
    for lines, count in (("", 0), (LINES, 2)):
        subprocess.run(
            ["bash", "-c", script, "bans", tmp_path],
            input=lines,
            text=True,
            check=True,
            timeout=120,
        )
        figures = (tmp_path / "rave-bans.prom").read_text()
        assert figures.splitlines() == [
            "# TYPE rave_bans_total counter",
            f'rave_bans_total{{jail="ssh"}} {count:9d}',
        ]
