"""The image's Alertmanager, by the flags that it gets there: whom it tells what, and when again."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import json
import os
import re
import shlex
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ravectl import files, images
from ravectl.engines import debian
from ravectl.model import EngineName
from tests.plans import PLAN

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")

# in the image's root, and with a folder of ours for what it keeps
INSIDE = """\
mount -t tmpfs tmpfs "$1" && mkdir "$1"/{upper,work,root}
mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
mkdir "$1/root/state" && mount --bind "$3" "$1/root/state"
exec chroot "$1/root" prometheus-alertmanager --config.file=/state/config.yml \\
  --storage.path=/state/data "${@:4}"
"""
CONFIG = """\
route: {receiver: us, group_by: [alertname], group_wait: 1s, group_interval: 2s,
        repeat_interval: 12h}
receivers: [{name: us, webhook_configs: [{url: "http://127.0.0.1:%d/"}]}]
"""
SAVED_SECONDS = 15  # --data.maintenance-interval


def flags() -> list[str]:
    tree = images.render_debian(PLAN.on(EngineName.DEBIAN))
    found = re.search(r'ARGS="(.*)"', tree.file("etc/default/prometheus-alertmanager").content)
    assert found
    mine = ("--web.listen-address=", "--storage.path=")
    return [w for w in shlex.split(found[1]) if not w.startswith(mine)]


class Alertmanager:
    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, list[str]()
        base = debian.ensure_base(files.cache_dir(), PLAN.on(EngineName.DEBIAN).accounts)
        self.base = str(base.root)
        for name in ("mounts", "state"):
            (folder / name).mkdir()
        with socket.create_server(("127.0.0.1", 0)) as s:
            self.port = s.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [
            "unshare", "--mount", "bash", "-euc", INSIDE, "bash", str(self.folder / "mounts"),
            self.base, str(self.folder / "state"), f"--web.listen-address=127.0.0.1:{self.port}",
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([*argv, *flags()], stdout=log, stderr=log)
        self.until(self._is_ready)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=60).close()
            return True
        return False

    def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, (self.told, (self.folder / "log").read_text())
            time.sleep(0.1)

    def end(self, *, orderly: bool) -> None:
        if self.process is not None:
            (self.process.terminate if orderly else self.process.kill)()
            self.process.wait(60)

    def post(self, *, firing: bool) -> None:
        """As Prometheus does, which says what fires again and again."""
        now = datetime.datetime.now(datetime.UTC)
        ends = now + datetime.timedelta(minutes=5) if firing else now
        alert = {
            "labels": {"alertname": "AuthFailures"},
            "startsAt": now.isoformat(),
            "endsAt": ends.isoformat(),
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/v2/alerts", json.dumps([alert]).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        urllib.request.urlopen(request, timeout=60).close()


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[Alertmanager]:
    made = Alertmanager(tmp_path)

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.told.append(body["status"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "state/config.yml").write_text(CONFIG % server.server_port)
        made.start()
        try:
            yield made
        finally:
            made.end(orderly=False)
            server.shutdown()


def test_an_alert_that_comes_again_after_a_crash_is_told(alertmanager: Alertmanager) -> None:
    """It ended in between: what the disk knows of it must not be that it was told already."""
    alertmanager.post(firing=True)
    alertmanager.until(lambda: alertmanager.told == ["firing"])
    alertmanager.end(orderly=True)  # which writes down that it was told
    alertmanager.start()
    alertmanager.post(firing=True)
    time.sleep(3)  # once told is enough
    alertmanager.post(firing=False)
    alertmanager.until(lambda: alertmanager.told == ["firing", "resolved"])
    time.sleep(SAVED_SECONDS + 3)
    alertmanager.end(orderly=False)
    alertmanager.start()
    alertmanager.post(firing=True)
    alertmanager.until(lambda: alertmanager.told == ["firing", "resolved", "firing"])
