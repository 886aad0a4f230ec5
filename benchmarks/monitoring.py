"""What the monitoring of a SAFE machine costs by itself, natively: CPU and memory of each program.

    benchmarks/watching [SECONDS]     120 by default, after 30 to settle; needs root

The programs and their configuration are those of the image (the cached Debian base and the
rendered tree), in a network namespace of their own. nginx is there with its status page and
sends mtail ten requests a second. PostgreSQL, Vibe Kanban, the router and the dispatcher are
not: asking them fails, so their exporters' figures are lower than in a machine.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ravectl import files, images, profile
from ravectl.engines import debian
from ravectl.model import RenderedTree
from ravectl.plan import make_plan

SETTLE_SECONDS = 30
REQUESTS_A_SECOND = 10
MOST_PERCENT = 10.0  # of one core
PACKAGES = {
    "prometheus": "prometheus",
    "alertmanager": "prometheus-alertmanager",
    "victoriametrics": "victoria-metrics",
    "pushgateway": "prometheus-pushgateway",
    "node-exporter": "prometheus-node-exporter",
    "nginx-exporter": "prometheus-nginx-exporter",
    "postgres-exporter": "prometheus-postgres-exporter",
    "blackbox-exporter": "prometheus-blackbox-exporter",
}
NGINX = """\
daemon off; master_process off; pid {0}/nginx.pid; error_log stderr crit;
events {{ }}
http {{
  log_format rave_http 'rave_http console $status $request_time plain\\n';
  server {{ listen 127.0.0.1:3002; access_log syslog:server=unix:{0}/mtail.sock rave_http;
    location / {{ return 200; }} }}
  server {{ listen 127.0.0.1:8080; access_log off; location = /status {{ stub_status; }} }}
}}
"""


def commands(tree: RenderedTree, root: Path, work: Path) -> dict[str, list[str]]:
    """Each program with the arguments that it has in the machine; its places are below `work`."""
    found = {}
    for name, package in PACKAGES.items():
        text = tree.file(f"etc/default/{package}").content
        (line,) = [x for x in text.splitlines() if x.startswith("ARGS=")]
        words = shlex.split(line.removeprefix("ARGS="))[0].split()
        moved = [_moved(w, work) for w in words]
        if name in ("prometheus", "alertmanager"):
            moved.append(f"--config.file={work}/etc/prometheus/{name}.yml")
        found[name] = [str(root / "usr/bin" / package), *moved]
    found["mtail"] = [
        str(root / "usr/bin/mtail"), "--progs", f"{work}/etc/mtail", "--logs",
        f"unixgram://{work}/mtail.sock", "--address", "127.0.0.1", "--port", "3903",
        "--logtostderr",
    ]  # fmt: skip
    # the control groups of this host's own units stand for the machine's
    units = f"{work}/usr/lib/rave/units"
    found["rave-units"] = ["bash", units, f"{work}/run", "/sys/fs/cgroup/system.slice"]
    return found


def _moved(word: str, work: Path) -> str:
    for folder in ("/var/lib/", "/etc/", "/run/rave-units"):
        place = f"{work}/run" if folder == "/run/rave-units" else f"{work}{folder}"
        word = word.replace(f"={folder}", f"={place}")
    return word


@contextlib.contextmanager
def running(programs: dict[str, list[str]], work: Path) -> Iterator[dict[str, int]]:
    """All of them, in a network namespace that the caller is in."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    plan = make_plan(**profile.load("safe", None).plan_arguments())
    try:
        for name, words in programs.items():
            env = dict(os.environ)
            if name in {s.name for s in plan.services}:
                limits = plan.service(name).limits
                env["GOMEMLIMIT"] = f"{limits.memory_mb * 3 // 4}MiB"
                env["GOMAXPROCS"] = str((limits.cpu_percent + 99) // 100)
            with (work / f"{name}.log").open("wb") as log:
                started[name] = subprocess.Popen(words, cwd=work, env=env, stdout=log, stderr=log)
        yield {name: p.pid for name, p in started.items()}
    finally:
        for p in started.values():
            p.terminate()
        for p in started.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                p.wait(10)
            p.kill()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process; OSError when it has ended."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """Memory of its own, pages of files not counted."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [x for x in lines if x.startswith("RssAnon:")]
    return int(line.split()[1]) / 1024


def inside(seconds: int) -> None:
    """Measure, in a namespace that has nothing but a loopback."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    plan = make_plan(**profile.load("safe", None).plan_arguments())
    base = debian.ensure_base(files.cache_dir(), plan.accounts)
    tree = images.render_debian(plan)
    # Alertmanager's templates and the pages of all of them
    shared = "usr/share/prometheus"
    subprocess.run(["mount", "--bind", base.root / shared, f"/{shared}"], check=True)
    with tempfile.TemporaryDirectory(prefix="rave-monitoring.") as folder:
        work = Path(folder)
        work.chmod(0o755)
        for f in tree.files:
            wanted = ("etc/prometheus/", "etc/mtail/", "etc/rave/", "usr/lib/rave/units")
            if f.target is None and f.path.startswith(wanted):
                path = work / f.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f.content.replace("/etc/prometheus/", f"{work}/etc/prometheus/"))
        for name in ("run", "var/lib/prometheus/node-exporter", "var/lib/prometheus/pushgateway"):
            (work / name).mkdir(parents=True)
        (work / "nginx.conf").write_text(NGINX.format(work))
        programs = commands(tree, base.root, work)
        web = {"nginx": ["nginx", "-c", f"{work}/nginx.conf"]}
        with running(programs, work) as pids, running(web, work):
            _report(pids, work, seconds)


def _report(pids: dict[str, int], work: Path, seconds: int) -> None:
    _ask(SETTLE_SECONDS)
    before = {n: cpu_seconds(p) for n, p in pids.items()}
    began = time.monotonic()
    _ask(seconds)
    took = time.monotonic() - began
    total = 0.0
    for name, pid in pids.items():
        if "(zombie)" in Path(f"/proc/{pid}/status").read_text():
            log = (work / f"{name}.log").read_text()
            raise SystemExit(f"{name} ended: {log[-500:]}")
    for name, pid in pids.items():
        percent = 100 * (cpu_seconds(pid) - before[name]) / took
        total += percent
        print(f"{name:<20} {percent:6.2f} % of a core  {resident_mb(pid):6.1f} MB")
    print(f"{'all of it':<20} {total:6.2f} % of a core, at most {MOST_PERCENT:.0f}")
    if total > MOST_PERCENT:
        raise SystemExit(3)


def _ask(seconds: int) -> None:
    """Requests to the ingress, for so long."""
    from urllib.error import URLError  # noqa: PLC0415
    from urllib.request import urlopen  # noqa: PLC0415

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(URLError), urlopen("http://127.0.0.1:3002/", timeout=5) as answer:
            answer.read()
        time.sleep(1 / REQUESTS_A_SECOND)


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        inside(int(sys.argv[2]))
        return
    seconds = sys.argv[1] if len(sys.argv) > 1 else "120"
    inner = [sys.executable, "-m", "benchmarks.monitoring", "--inside", seconds]
    raise SystemExit(
        subprocess.run(["unshare", "--net", "--mount", *inner], check=False).returncode
    )


if __name__ == "__main__":
    main()
