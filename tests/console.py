"""The console as in the machine, for tests: dispatcher, Prometheus, node exporter and nginx, all
real, nginx with the rendered configuration (at other paths and ports)."""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ravectl import images, profile
from ravectl.model import EngineName
from ravectl.plan import make_plan
from tests import dispatcher

PLAN = make_plan(**profile.load("safe", None).plan_arguments())
USER, PASSWORD = "rave", "password-of-the-test"
SCRAPE_SECONDS = 1
# by the job that collects from it, as the Plan has it; the one that is gone is none of ours
SERVICES = {
    "node": "node-exporter",
    "prometheus": "prometheus",
    "dispatcher": "dispatcher",
    "gone": "gone",
}
# a unit that does not run
STOPPED = "claude-code-router.service"
HISTORY_MEMORY = 41.0  # percent used, in the history

RULES = """
groups:
  - name: test
    rules:
      - alert: ServiceDown
        expr: up{job="gone"} == 0
        labels: {severity: critical}
        annotations: {summary: "{{ $labels.job }} does not answer <img src=x onerror=alert(1)>"}
      - alert: DiskFilling
        expr: vector(1)
        for: 1h
        labels: {severity: warning}
        annotations: {summary: "the disk is more than 80 % full"}
"""


@dataclass
class Site:
    """All of it, running. Any part may be stopped and started again."""

    folder: Path
    dispatcher: dispatcher.Dispatcher
    ports: dict[str, int]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.folder / "console.sock"

    @property
    def url(self) -> str:
        return f"https://localhost:{self.ports['nginx']}"

    def spawn(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_prometheus(self) -> None:
        self.spawn(
            "prometheus", "prometheus", f"--config.file={self.folder}/prometheus.yml",
            f"--storage.tsdb.path={self.folder}/tsdb", "--log.level=warn",
            f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}",
        )  # fmt: skip
        wait_for(self.prometheus + "/-/ready")

    @property
    def prometheus(self) -> str:
        return f"http://127.0.0.1:{self.ports['prometheus']}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


def wait_for(url: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)


@contextlib.contextmanager
def running(folder: Path, *, history: bool = True) -> Iterator[Site]:
    """The site, until the block ends. With `history`, of an hour that Prometheus did not see."""
    names = ("nginx", "status", "prometheus", "node", "gone", "kanban", "router")
    ports = {name: dispatcher.free_port() for name in names}
    shipped = yaml.safe_load(images.render_debian(PLAN).file("etc/rave/dispatcher.yaml").content)
    made = dispatcher.make(
        folder / "dispatcher",
        console={
            **shipped["console"], "socket": str(folder / "console.sock"),
            "prometheus": f"http://127.0.0.1:{ports['prometheus']}",
            "scrape_seconds": SCRAPE_SECONDS,
        },
        rules=[
            {"name": "all", "agent_type": "backend-architect", "prompt": "{{ $.title }}",
             "sources": ["github"], "types": ["issues"]}
        ],
    )  # fmt: skip
    site = Site(folder, made, ports)
    try:
        made.start()
        _start_node_exporter(site)
        _configure_prometheus(site)
        if history:
            _backfill(site)
        site.start_prometheus()
        _start_nginx(site)
        yield site
    finally:
        for name in list(site.processes):
            site.stop(name)
        made.kill()


def _start_node_exporter(site: Site) -> None:
    texts = site.folder / "textfile"
    texts.mkdir()
    # rave-units itself, with folders where the kernel has the units' control groups
    script, groups = site.folder / "units", site.folder / "groups"
    script.write_text(images.render_debian(PLAN).file("usr/lib/rave/units").content)
    for unit in PLAN.units(EngineName.DEBIAN):
        inside = f"system-{unit.split('@')[0]}.slice" if "@" in unit else ""
        if unit != STOPPED:
            (groups / inside / unit).mkdir(parents=True)
    subprocess.run(["bash", script, texts, groups, "once"], check=True, timeout=120)
    site.spawn(
        "node", "prometheus-node-exporter", f"--web.listen-address=127.0.0.1:{site.ports['node']}",
        "--collector.disable-defaults", "--collector.cpu", "--collector.meminfo",
        "--collector.filesystem", "--collector.textfile",
        f"--collector.textfile.directory={texts}",
    )  # fmt: skip
    wait_for(f"http://127.0.0.1:{site.ports['node']}/metrics")


def _configure_prometheus(site: Site) -> None:
    ports = {
        "node": site.ports["node"], "prometheus": site.ports["prometheus"],
        "dispatcher": site.dispatcher.port, "gone": site.ports["gone"],
    }  # fmt: skip
    (site.folder / "rules.yml").write_text(RULES)
    config = {
        "global": {
            "scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s",
            "scrape_timeout": f"{SCRAPE_SECONDS}s",
        },
        "rule_files": [str(site.folder / "rules.yml")],
        "scrape_configs": [
            {
                "job_name": name,
                "honor_labels": name == "node",  # rave-units names the services itself
                "static_configs": [
                    {"targets": [f"127.0.0.1:{port}"], "labels": {"service": SERVICES[name]}}
                ],
            }
            for name, port in ports.items()
        ],
    }  # fmt: skip
    (site.folder / "prometheus.yml").write_text(yaml.safe_dump(config))


def _backfill(site: Site) -> None:
    """Blocks of an hour and a half until now, by Prometheus' own tool."""
    path = site.folder / "history.txt"
    path.write_text(history(time.time()))
    subprocess.run(
        ["promtool", "tsdb", "create-blocks-from", "openmetrics", path, site.folder / "tsdb"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip


def history(now: float) -> str:
    """OpenMetrics of a machine that has an hour of work behind it, 15 s apart."""
    times = [int(now) // 15 * 15 - 5400 + 15 * i for i in range(361)]
    found: list[str] = []

    def family(name: str, kind: str, rows: dict[str, Any]) -> None:
        found.append(f"# TYPE {name} {kind}")
        suffix = {"counter": "_total", "histogram": "_bucket", "gauge": ""}[kind]
        for labels, value in rows.items():
            found.extend(
                f"{name}{suffix}{{{labels}}} {value(i):.6g} {t}" for i, t in enumerate(times)
            )

    def load(i: int) -> float:
        return 0.25 + 0.15 * math.sin(i / 19) + 0.1 * math.sin(i / 5) + 0.35 * (150 < i < 190)

    idle = [0.0]
    for i in range(1, 361):
        idle.append(idle[-1] + 15 * (1 - load(i)))
    family(
        "node_cpu_seconds", "counter",
        {'instance="h",cpu="0",mode="idle"': lambda i: idle[i],
         'instance="h",cpu="0",mode="user"': lambda i: 15 * i - idle[i]},
    )  # fmt: skip
    gb = 2**30
    family("node_memory_MemTotal_bytes", "gauge", {'instance="h"': lambda _: 2 * gb})
    family(
        "node_memory_MemAvailable_bytes", "gauge",
        {'instance="h"': lambda _: 2 * gb * (1 - HISTORY_MEMORY / 100)},
    )  # fmt: skip
    disk = 'instance="h",mountpoint="/",fstype="ext4"'
    family("node_filesystem_size_bytes", "gauge", {disk: lambda _: 10 * gb})
    family("node_filesystem_avail_bytes", "gauge", {disk: lambda i: (7 - i / 360) * gb})
    route = 'instance="h",method="POST",route="/webhooks/{source}"'
    family(
        "rave_dispatcher_http_requests", "counter",
        {f'{route},status="202"': lambda i: i * 9 + 60 * math.sin(i / 20),
         f'{route},status="401"': lambda i: i * 1.5,
         f'{route},status="503"': lambda i: max(0, min(i, 190) - 170) * 2},
    )  # fmt: skip
    bounds = {"0.005": 0.5, "0.01": 0.8, "0.02": 0.97, "0.05": 0.985, "0.1": 1, "+Inf": 1}
    family(
        "rave_dispatcher_http_request_duration_seconds", "histogram",
        {f'instance="h",route="/webhooks/{{source}}",le="{le}"': lambda i, part=part: i * 10 * part
         for le, part in bounds.items()},
    )  # fmt: skip
    family(
        "rave_dispatcher_queue_depth", "gauge",
        {'instance="h",state="pending"': lambda i: max(0, 6 * math.sin(i / 25)) // 1,
         'instance="h",state="running"': lambda i: float(i % 9 < 6),
         'instance="h",state="unprocessed"': lambda i: float(i % 40 == 0)},
    )  # fmt: skip
    family(
        "rave_dispatcher_task_attempts", "counter",
        {'instance="h",agent_type="ai-engineer",outcome="succeeded"': lambda i: i // 5,
         'instance="h",agent_type="ai-engineer",outcome="error"': lambda i: i // 31,
         'instance="h",agent_type="ai-engineer",outcome="cancelled"': lambda i: i // 150},
    )  # fmt: skip
    return "\n".join([*found, "# EOF", ""])


def _start_nginx(site: Site) -> None:
    folder = site.folder
    tree = images.render_debian(PLAN)
    for f in tree.files:
        if f.path.startswith("usr/share/rave/www/"):
            path = folder / "www" / f.path.removeprefix("usr/share/rave/www/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f.content)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", folder / "key", "-out", folder / "cert", "-subj", "/CN=localhost",
         "-days", "2"],
        check=True, capture_output=True,
    )  # fmt: skip
    (folder / "htpasswd").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
    (folder / "router-key.conf").write_text(
        'map $http_x_api_key $rave_router_realm { default "RAVE"; }\n'
        'map $http_x_api_key $rave_router_key { default ""; }\n'
        # no limit: these tests sign in wrongly more often than a person
        'map $http_x_rave_trial $rave_stranger { default ""; }\n'
    )
    text = tree.file("etc/nginx/nginx.conf").content
    for old, new in (
        ("user www-data;", "user root;"),
        ("/run/rave-ingress/nginx.pid", f"{folder}/nginx.pid"),
        ("/run/secrets/ingress/tls-cert", f"{folder}/cert"),
        ("/run/secrets/ingress/tls-key", f"{folder}/key"),
        ("/run/secrets/ingress/htpasswd", f"{folder}/htpasswd"),
        ("/run/rave-ingress/router-key.conf", f"{folder}/router-key.conf"),
        ("/run/rave-dispatcher/console.sock", str(site.socket)),
        ("/usr/share/rave/www", f"{folder}/www"),
        ("listen 3002", f"listen 127.0.0.1:{site.ports['nginx']}"),
        ("listen 127.0.0.1:8080", f"listen 127.0.0.1:{site.ports['status']}"),
        ("127.0.0.1:3001", f"127.0.0.1:{site.dispatcher.port}"),
        ("127.0.0.1:3000", f"127.0.0.1:{site.ports['kanban']}"),
        ("127.0.0.1:3456", f"127.0.0.1:{site.ports['router']}"),
        ("error_log syslog:server=unix:/dev/log,nohostname warn", f"error_log {folder}/errors.log"),
        ("syslog:server=unix:/dev/log,nohostname,tag=nginx_access", f"{folder}/access.log"),
        ("syslog:server=unix:/run/mtail/nginx.sock,nohostname,tag=nginx", f"{folder}/requests.log"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    # what this host's own paths are for
    assert not re.search(r"/run/|/dev/log", text)
    (folder / "nginx.conf").write_text(text)
    site.spawn("nginx", "nginx", "-c", f"{folder}/nginx.conf", "-g", "daemon off;")
    wait_for(f"http://127.0.0.1:{site.ports['status']}/status")
