"""Any valid profile renders, twice to the same bytes, and the daemons accept their files.

Each daemon's own checker runs on the rendered files at their real paths: in a mount namespace
where the tree lies over this host's root, with an own /run in which the rendered scripts have
put secrets. Nothing of it touches the host.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ravectl import credentials, files, profile, sops, vault
from ravectl.model import SERVICE_NAMES, EngineName, Plan, RenderedTree, SecretKind
from ravectl.plan import make_plan
from ravectl.render import render, write_tree
from tests import nixos

TEMPLATES = files.find_data("templates") / "debian"


def rendered(plan: Plan) -> RenderedTree:
    return render(
        TEMPLATES, plan, accounts=plan.accounts, required=vault.required(plan),
        bundle_magic=vault.MAGIC,
    )  # fmt: skip


def shipped(name: str) -> Plan:
    """What a Debian machine of a shipped profile is, or of what both engines can have."""
    if name == nixos.on_both().profile:
        return nixos.on_both().on(EngineName.DEBIAN)
    return make_plan(**profile.load(name, None).plan_arguments()).on(EngineName.DEBIAN)


# --- any valid profile --------------------------------------------------------------------------

NAMES = st.from_regex("[a-z]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True)
PORTS = st.none() | st.integers(1024, 65535)


def amount(low: int, high: int, unit: str) -> st.SearchStrategy[str]:
    return st.integers(low, high).map(lambda n: f"{n} {unit}")


METRICS_URLS = st.from_regex(
    r"(https://[a-z0-9][a-z0-9.-]{0,38}[a-z0-9]|http://10\.0\.2\.2)(:[1-9][0-9]{0,3})?(/[A-Za-z0-9._~/-]{0,40})?",
    fullmatch=True,
)
PROVIDERS = st.fixed_dictionaries(
    {
        "name": NAMES,
        "url": st.from_regex(
            r"(https://[a-z0-9.-]{1,40}|http://10\.0\.2\.2)(:[0-9]{1,5})?(/[A-Za-z0-9._~/%?=&-]{0,40})?",
            fullmatch=True,
        ),
        "models": st.lists(
            st.from_regex("[A-Za-z0-9][A-Za-z0-9._:/+-]{0,40}", fullmatch=True),
            min_size=1,
            max_size=3,
        ),
    }
)
LIMITS = st.fixed_dictionaries(
    {
        "memory": st.integers(16, 4096),
        "cpu": amount(5, 6400, "%"),
        "oom_score_adjust": st.integers(-1000, 1000),
        "tasks": st.integers(8, 32768),
    }
)
CA = credentials.ca_certificate(credentials.new_value(SecretKind.CA_KEY))
FORWARDS = st.none() | st.fixed_dictionaries(
    {
        "url": st.builds(
            "{}:{}".format,
            st.sampled_from(["https://logs.example.org", "https://l", "http://10.0.2.2"]),
            st.integers(1, 65535),
        ),
        "ca": st.none() | st.just(CA),
    }
)
SHIPPED_NAMES = profile.shipped()


@st.composite
def profiles(draw: st.DrawFn) -> dict[str, Any]:
    """A profile as a person may write it: every key over its whole range, sums that hold."""
    services = draw(st.fixed_dictionaries(dict.fromkeys(SERVICE_NAMES, LIMITS)))
    memory = max(1024, 384 + sum(s["memory"] for s in services.values()) + draw(st.integers(0, 99)))
    disk = draw(st.integers(4, 2**14))
    ssh_port, https_port = draw(
        st.tuples(PORTS, PORTS).filter(lambda p: p[0] is None or p[0] != p[1])
    )
    egress = draw(st.booleans())
    return {
        "monitoring": {"remote_write": [draw(METRICS_URLS)]} if egress else {},
        "name": draw(NAMES.filter(lambda name: name not in SHIPPED_NAMES)),
        "machine": {
            "memory": f"{memory} MB",
            "cpus": draw(st.integers(1, 64)),
            "disk": f"{disk} GB",
        },
        "services": {n: {**s, "memory": f"{s['memory']} MB"} for n, s in services.items()},
        "agents": {"concurrency": draw(st.integers(1, 64))},
        "network": {
            "egress": egress,
            "ssh_port": ssh_port,
            "https_port": https_port,
        },
        "scrape_every": draw(amount(1, 60, "s")),
        "retention": {
            "metrics": draw(amount(1, 3650, "days")),
            "metrics_size": draw(amount(64, min(2**20, disk * 512), "MB")),
            "critical_metrics": draw(amount(1, 521, "weeks")),
            "events": draw(amount(1, 3650, "days")),
            "backups": draw(st.integers(1, 3650).map(lambda days: f"{24 * days} h")),
            "backup_every": draw(amount(1, 1440, "min")),
        },
        "logs": {
            "keep": draw(amount(1, 3650, "days")),
            "size": draw(amount(32, min(2**20, disk * 256), "MB")),
            "keep_free": draw(amount(64, min(2**20, disk * 256), "MB")),
            "burst": draw(st.integers(100, 1_000_000)),
            "forward": draw(FORWARDS),
        },
        "router": {
            "providers": draw(
                st.lists(PROVIDERS, min_size=1, max_size=3, unique_by=lambda p: p["name"])
            )
        },
    }


def plan_of(written: dict[str, Any]) -> Plan:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as f:
        yaml.safe_dump(written, f)
        f.flush()
        return make_plan(**profile.select(None, {}, Path(f.name)).plan_arguments())


@settings(deadline=None, max_examples=25)
@given(written=profiles())
def test_any_valid_profile_renders_twice_to_the_same_bytes(written: dict[str, Any]) -> None:
    plan = plan_of(written)
    assert plan == plan_of(written)
    assert sum(s.limits.memory_mb for s in plan.services) <= plan.service_memory_mb
    tree = rendered(plan)
    assert tree == rendered(plan_of(written))
    paths = [f.path for f in tree.files]
    assert paths == sorted(set(paths))
    # the dispatcher's rules and the alerts' texts have places of their own, which they fill in
    theirs = ("opt/", "etc/rave/dispatcher", "etc/prometheus/alert")
    ours = [f for f in tree.files if not f.path.startswith(theirs)]
    assert not any("{{" in f.content or "{%" in f.content for f in ours)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_written_tree_is_the_rendered_one(name: str, tmp_path: Path) -> None:
    tree = rendered(shipped(name))
    write_tree(tree, tmp_path)
    write_tree(tree, tmp_path)  # over what is there already
    for f in tree.files:
        path = tmp_path / f.path
        if f.target is not None:
            assert str(path.readlink()) == f.target
        else:
            assert path.read_text() == f.content
            assert path.stat().st_mode & 0o7777 == f.mode
    found = {
        str(p.relative_to(tmp_path))
        for p in tmp_path.rglob("*")
        if not p.is_dir() or p.is_symlink()
    }
    assert found == {f.path for f in tree.files}


def test_profiles_render_to_different_limits_and_retention() -> None:
    safe, full = (rendered(shipped(name)) for name in ("safe", "full-pipe"))
    unit = "etc/systemd/system/vibe-kanban.service"
    assert "MemoryMax=144M" in safe.file(unit).content
    assert "MemoryMax=320M" in full.file(unit).content
    assert "--storage.tsdb.retention.time=3d" in safe.file("etc/default/prometheus").content
    assert "--storage.tsdb.retention.time=7d" in full.file("etc/default/prometheus").content


# --- a place that looks like the machine -------------------------------------------------------

API_KEY = "key-of-the-test"
# delivered, and read by nothing that is rendered
UNREAD = (
    "postgres/exporter-password", "dispatcher/api-token", "dispatcher/alerts-token",
    "dispatcher/gitlab-token", "dispatcher/github-secret", "dispatcher/standard-secret",
    "monitoring/secrets.prom", "grafana/secret-key", "grafana/admin-password",
)  # fmt: skip

# the tree over stand-ins over this host's root; upper and lower must not lie within each other,
# hence the tmpfs. /run is made by the rendered scripts themselves, from credentials.
ENTER = """
stage=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$stage/space"
cd "$stage/space"
cp -a ../tree ../standins .
mkdir work root
mount -t overlay overlay -o "lowerdir=$PWD/standins:/,upperdir=$PWD/tree,workdir=$PWD/work" root
mount -t tmpfs -o mode=755 tmpfs root/run
mount --bind /dev root/dev
mount -t proc proc root/proc
mkdir root/run/sshd root/run/rave-ingress
ip link set lo up
CREDENTIALS_DIRECTORY=/credentials chroot root /usr/lib/rave/secrets boot
chroot root /usr/lib/rave/ingress-config
exec chroot root "$@"
"""

# Units and programs that this host need not have, so stand-ins of what Debian's packages and
# the base bring: they are not under test, what is rendered on top of them is.
MONITORING = (
    "prometheus-alertmanager", "prometheus-pushgateway", "prometheus-node-exporter",
    "prometheus-nginx-exporter", "prometheus-postgres-exporter", "prometheus-blackbox-exporter",
    "victoria-metrics",
)  # fmt: skip
STANDIN_UNITS = {
    **{
        f"{name}.service": (
            "[Unit]\nDescription=stand-in\n[Service]\nUser=prometheus\n"
            f"EnvironmentFile=/etc/default/{name}\nExecStart=/usr/bin/{name} $ARGS\n"
        )
        for name in MONITORING
    },
    "grafana-server.service": (
        "[Unit]\nDescription=stand-in\n[Service]\nUser=daemon\n"
        "ExecStart=/usr/share/grafana/bin/grafana server\n"
    ),
    "mtail.service": (
        "[Unit]\nDescription=stand-in\n[Service]\nUser=daemon\nExecStart=/usr/bin/mtail\n"
    ),
    "postgresql@.service": (
        "[Unit]\nDescription=stand-in %i\n[Service]\nType=forking\nUser=postgres\n"
        "ExecStart=/usr/bin/pg_ctlcluster --skip-systemctl-redirect %i start\n"
    ),
}
STANDIN_PROGRAMS = (
    *(f"usr/bin/{name}" for name in MONITORING),
    "usr/bin/mtail",
    "usr/share/grafana/bin/grafana",
    "usr/bin/pg_ctlcluster",
    "usr/lib/postgresql/17/bin/postgres",
    "usr/bin/node",
    "opt/vibe-kanban/vibe-kanban",
)


@functools.cache
def values() -> dict[str, str]:
    """What a machine's secrets are, made by the tools that people have."""
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(subprocess.run, cwd=folder, check=True, capture_output=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "host"])
        run(
            shlex.split(
                "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
                "-keyout key -out cert -subj /CN=test -days 2"
            )
        )
        at = Path(folder)
        return {
            "ssh/host-key": (at / "host").read_text(),
            "ssh/authorized-keys": (at / "host.pub").read_text(),
            "ingress/tls-key": (at / "key").read_text(),
            "ingress/tls-cert": (at / "cert").read_text(),
            "ingress/htpasswd": "rave:{PLAIN}test\n",
            "ccr/api-key": API_KEY + "\n",
            "postgres/exporter-scram": "SCRAM-SHA-256$4096:c2FsdA==$a:b\n",
            **dict.fromkeys(UNREAD, "x\n"),
        }


def make_standins(plan: Plan, folder: Path) -> None:
    """The layer below the tree: accounts, units, programs and credentials."""
    etc = folder / "etc"
    etc.mkdir(parents=True)
    for name in ("passwd", "group"):
        ours = "".join(
            f"{a.name}:x:{a.uid}:{a.uid}::{a.home}:/bin/bash\n"
            if name == "passwd"
            else f"{a.name}:x:{a.uid}:\n"
            for a in plan.accounts
        )
        # what the package of Grafana makes
        ours += "grafana:x:990:990::/:/bin/sh\n" if name == "passwd" else "grafana:x:990:\n"
        (etc / name).write_text(Path("/etc", name).read_text() + ours)
    units = folder / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for name, content in STANDIN_UNITS.items():
        (units / name).write_text(content)
    for name in STANDIN_PROGRAMS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    handed = folder / "credentials"
    handed.mkdir()
    identity, recipient = sops.new_identity()
    (handed / "rave.age-identity").write_text(identity + "\n")
    known = {s.name for s in plan.delivered()}
    given = {name: value for name, value in values().items() if name in known}
    (handed / "rave.bundle").write_bytes(vault.bundle(plan, given, 7, recipient))


@dataclasses.dataclass
class Place:
    """A folder with a tree and its stand-ins, in which commands can be run as if it were /."""

    plan: Plan
    stage: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        private = ["unshare", "--mount", "--net", "--propagation", "private"]
        return subprocess.run(
            [*private, "sh", "-euc", ENTER, "sh", str(self.stage), *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/run/home"},
        )


def make_place(plan: Plan, tree: RenderedTree, stage: Path) -> Place:
    shutil.rmtree(stage, ignore_errors=True)
    (stage / "space").mkdir(parents=True)
    write_tree(as_known_to_this_host(tree), stage / "tree")
    make_standins(plan, stage / "standins")
    for folder, _, _ in os.walk(stage):
        Path(folder).chmod(0o755)
    return Place(plan, stage)


# Debian 13's OpenSSH knows these, Debian 12's does not and refuses the whole file.
NEW_KEX = ("mlkem768x25519-sha256", "sntrup761x25519-sha512")
# settings that came with OpenSSH 9.8, and lines that it has of them
NEW_SETTINGS = ("PerSourcePenalties",)
# Keys of units that this host's systemd may be too old for: it ignores them, and says so.
NEW_UNIT_KEYS = ("ImportCredential", "RestartSteps", "RestartMaxDelaySec")


def as_known_to_this_host(tree: RenderedTree) -> RenderedTree:
    """The tree without the names in NEW_KEX that this host's sshd lacks; no other is spared."""
    known = subprocess.run(["ssh", "-Q", "kex"], capture_output=True, text=True, check=True)
    version = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr
    found = re.match(r"OpenSSH_(\d+)\.(\d+)", version)
    knows_penalties = found is not None and (int(found[1]), int(found[2])) >= (9, 8)
    lacking = set(NEW_KEX) - set(known.stdout.split())

    def adapt(line: str) -> str:
        key, _, names = line.partition(" ")
        if key in NEW_SETTINGS and not knows_penalties:
            return f"# {line}"
        if key != "KexAlgorithms":
            return line
        return f"{key} {','.join(n for n in names.split(',') if n not in lacking)}"

    return edited(
        tree, "etc/ssh/sshd_config", lambda t: "\n".join(map(adapt, t.splitlines())) + "\n"
    )


def edited(tree: RenderedTree, path: str, change: Callable[[str], str]) -> RenderedTree:
    return RenderedTree(
        tuple(
            dataclasses.replace(f, content=change(f.content)) if f.path == path else f
            for f in tree.files
        )
    )


# --- the daemons' own checkers ------------------------------------------------------------------


def nginx(place: Place) -> str:
    return complaint(place.run("nginx", "-t"))


def promtool(place: Place) -> str:
    return complaint(place.run("promtool", "check", "config", "/etc/prometheus/prometheus.yml"))


def sshd(place: Place) -> str:
    return complaint(place.run("/usr/sbin/sshd", "-t"))


def nft(place: Place) -> str:
    return complaint(place.run("nft", "--check", "--file", "/etc/nftables.conf"))


def systemd(place: Place) -> str:
    units = [*place.plan.units(EngineName.DEBIAN), "rave-secrets.service", "nftables.service"]
    result = place.run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units)
    too_new = re.compile(rf"Unknown key (name )?'({'|'.join(NEW_UNIT_KEYS)})' in section")
    lines = [n for n in result.stderr.splitlines() if not too_new.search(n)]
    # it succeeds in spite of a line that it ignores; what this host's own units are is its affair
    ours = [n for n in lines if "/etc/systemd/system/" in n or n.startswith(tuple(units))]
    return "\n".join(ours) or ("" if result.returncode == 0 else "\n".join(lines))


GIVEN_KEY = 'sk-"quoted"\\and & slashed/'


def scripts(place: Place) -> str:
    """The rendered scripts have run on the way in; the router's writes what the router reads."""
    # as systemd hands them over: LoadCredential= of a file, and of a folder
    script = (
        "mkdir -p $HOME/given; export CREDENTIALS_DIRECTORY=$HOME/given; "
        "cp /run/rave/router-key $HOME/given/router-key; "
        f"printf '%s\\n' '{GIVEN_KEY}' >$HOME/given/agents_anthropic-api-key; "
        "/usr/lib/rave/router-config; cat $HOME/.claude-code-router/config.json; "
        "cat /run/rave/router-key"
    )
    result = place.run("sh", "-euc", script)
    if result.returncode:
        return complaint(result)
    try:
        text, _, key = result.stdout.rstrip("\n").rpartition("\n")
        config = json.loads(text)
    except ValueError as e:
        return f"config.json: {e}"
    expected = [(p.name, p.url, list(p.models)) for p in place.plan.router_providers]
    seen = [(p["name"], p["api_base_url"], p["models"]) for p in config["Providers"]]
    right = (seen, config["APIKEY"], config["HOST"]) == (expected, key, "127.0.0.1")
    right = right and {p["api_key"] for p in config["Providers"]} == {GIVEN_KEY}
    return "" if right else f"config.json: {config}"


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """What a checker objects to; empty when it accepts."""
    if result.returncode == 0:
        return ""
    return (result.stdout + result.stderr).strip() or f"exit code {result.returncode}"


CHECKERS = (nginx, promtool, sshd, nft, systemd, scripts)

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounting the tree over this host's root needs root"
)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "stage"
    assert not any(str(tmp_path) in str(m) for m in files.mount_points())


@needs_root
@pytest.mark.parametrize("name", [*SHIPPED_NAMES, nixos.on_both().profile])
def test_daemons_accept_the_shipped_profiles(name: str, stage: Path) -> None:
    plan = shipped(name)
    place = make_place(plan, rendered(plan), stage)
    assert {c.__name__: c(place) for c in CHECKERS} == {c.__name__: "" for c in CHECKERS}


@needs_root
@settings(deadline=None, max_examples=6)
@given(written=profiles())
def test_daemons_accept_any_valid_profile(written: dict[str, Any]) -> None:
    plan = plan_of(written)
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(plan, rendered(plan), Path(folder) / "stage")
        assert {c.__name__: c(place) for c in CHECKERS} == {c.__name__: "" for c in CHECKERS}


BROKEN = [
    (nginx, "etc/nginx/nginx.conf", "server_tokens off;", "server_tokens of;"),
    (nginx, "etc/nginx/nginx.conf", "}\n", "\n"),
    (nginx, "etc/nginx/nginx.conf", "ingress/tls-cert;", "ingress/tls-certificate;"),
    (nginx, "usr/lib/rave/ingress-config", 'default "RAVE";', 'default "RAVE'),
    (promtool, "etc/prometheus/prometheus.yml", "scrape_interval: 10s", "scrape_interval: 10"),
    (promtool, "etc/prometheus/prometheus.yml", "job_name:", "jobname:"),
    (sshd, "etc/ssh/sshd_config", "PermitRootLogin no", "PermitRootLogin never"),
    (sshd, "etc/ssh/sshd_config", "sntrup761x25519-sha512,", "sntrup761x25519-sha513,"),
    (sshd, "etc/ssh/sshd_config", "/run/secrets/ssh/host-key", "/run/secrets/ssh/hostkey"),
    (nft, "etc/nftables.conf", "policy drop;", "policy dorp;"),
    (nft, "etc/nftables.conf", "tcp dport { 22, 3002 }", "tcp dport { 22, 300002 }"),
    (systemd, "etc/systemd/system/nginx.service.d/rave.conf", "MemoryMax=64M", "MemoryMax=64 MM"),
    (systemd, "etc/systemd/system/ssh.service.d/rave.conf", "TasksMax", "TaskMax"),
    (systemd, "etc/systemd/system/rave-secrets.service", "ImportCred", "ImportsCred"),
    (
        systemd,
        "etc/systemd/system/vibe-kanban.service",
        "/opt/vibe-kanban/vibe-kanban",
        "/opt/vibe-kanban/missing",
    ),
    (
        systemd,
        "etc/systemd/system/postgresql@17-main.service.d/rave.conf",
        "CPUQuota=100%",
        "CPUQuota=100",
    ),
    (scripts, "etc/rave/router.json", '"LOG": false,', '"LOG": false'),
    (scripts, "etc/rave/router.json", "@API_KEY@", "@APIKEY@"),
]


@needs_root
@pytest.mark.parametrize(
    ("checker", "path", "right", "wrong"), BROKEN, ids=[f"{b[0].__name__}-{b[3]!r}" for b in BROKEN]
)
def test_daemons_refuse_a_broken_rendering(
    checker: Callable[[Place], str], path: str, right: str, wrong: str, stage: Path
) -> None:
    plan = shipped("safe")
    tree = rendered(plan)
    assert right in tree.file(path).content
    broken = edited(tree, path, lambda text: text.replace(right, wrong, 1))
    assert checker(make_place(plan, broken, stage))


def test_only_names_that_are_too_new_are_spared() -> None:
    tree = rendered(shipped("safe"))
    path = "etc/ssh/sshd_config"
    before, after = (t.file(path).content for t in (tree, as_known_to_this_host(tree)))
    gone = set(re.split("[ ,\n]", before)) - set(re.split("[ ,\n]", after))
    assert gone <= set(NEW_KEX)
    assert "sntrup761x25519-sha512@openssh.com" in after
