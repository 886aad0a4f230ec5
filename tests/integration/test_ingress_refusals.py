"""The rendered ingress, running: whom it refuses, how often, and in which form."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ravectl import files
from tests.integration.test_rendered_tree import API_KEY, Place, make_place, rendered, shipped

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounting the tree over this host's root needs root"
)

# no service runs behind it: who is let in gets 502
START = """
nginx -g 'daemon off;' >/dev/null 2>&1 &
nginx=$!
trap 'kill $nginx; wait $nginx' EXIT
until curl -sk -o /dev/null https://localhost:3002/healthz; do sleep 0.1; done
ask() {
  echo "== $1"
  shift
  curl -sk --max-time 10 -w '%{http_code}\\n' "$@"
}
at=https://localhost:3002
"""


def answers(place: Place, script: str) -> list[tuple[str, str, str]]:
    """Name, status and the rest (headers, body) of each request."""
    done = place.run("bash", "-euc", START + script)
    assert done.returncode == 0, done.stderr
    found = []
    for part in done.stdout.split("== ")[1:]:
        name, _, rest = part.partition("\n")
        body, _, status = rest.rstrip("\n").rpartition("\n")
        found.append((name, status or body, body))
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    plan = shipped("safe")
    yield make_place(plan, rendered(plan), tmp_path / "stage")
    assert not any(str(tmp_path) in str(m) for m in files.mount_points())


def test_the_fourth_wrong_password_is_refused_and_the_right_one_is_not(place: Place) -> None:
    got = answers(
        place,
        """
for n in 1 2 3; do ask none -o /dev/null $at/kanban/; done
for n in 1 2 3 4 5; do ask wrong$n -i -u rave:wrong$n $at/kanban/; done
ask elsewhere -o /dev/null -u rave:wrong -H 'Host: kanban.localhost' $at/
ask key -o /dev/null -H 'x-api-key: wrong' $at/ccr/
ask right -o /dev/null -u rave:test $at/kanban/
ask right-key -o /dev/null -H "x-api-key: KEY" $at/ccr/
ask nobody -i $at/kanban/
ask trial -o /dev/null -u rave:wrong -H "x-rave-trial: KEY" $at/kanban/
ask no-trial -o /dev/null -u rave:wrong -H "x-rave-trial: KAY" $at/kanban/
""".replace("KEY", API_KEY),
    )
    status = {name: code for name, code, _ in got}
    assert [status[f"wrong{n}"] for n in range(1, 6)] == ["401", "401", "401", "429", "429"]
    assert (status["elsewhere"], status["key"]) == ("429", "429"), "one count for all routes"
    assert (status["right"], status["right-key"]) == ("302", "502"), "who may is let in"
    assert (status["nobody"], status["trial"]) == ("401", "401"), "who guesses nothing"
    assert status["no-trial"] == "429"
    told = {name: text for name, _, text in got}
    for name in ("wrong1", "wrong4", "nobody"):
        for header in ("Strict-Transport-Security", "Content-Security-Policy"):
            assert header in told[name], (name, header)
    assert 'WWW-Authenticate: Basic realm="RAVE"' in told["nobody"]
    assert "Retry-After: 60" in told["wrong4"]
    assert "The right one is let in" in told["wrong4"]
    assert "Retry-After" not in told["wrong1"]


def test_a_service_s_route_refuses_as_the_service_does(place: Place) -> None:
    got = answers(
        place,
        """
dd if=/dev/zero of=/run/large bs=1M count=11 status=none
ask down -i $at/api/v1/tasks
ask large -i -H Expect: -H 'Content-Type: application/json' --data-binary @/run/large \\
  $at/webhooks/github
ask health -i $at/healthz
ask post -o /dev/null -d x $at/healthz
""",
    )
    for name, status, slug in (
        ("down", "502", "unavailable"), ("large", "413", "too-large"),
        ("health", "502", "unavailable"),
    ):  # fmt: skip
        (text,) = [t for n, _, t in got if n == name]
        assert f" {status} " in text.splitlines()[0]
        assert re.search(r"(?im)^content-type: application/problem\+json", text)
        problem = json.loads(text[text.index("{") :])
        assert (problem["status"], problem["type"]) == (int(status), f"urn:rave:problem:{slug}")
        assert re.search("(?m)^Retry-After: 5", text) or status == "413"
    assert [s for n, s, _ in got if n == "post"] == ["403"]
