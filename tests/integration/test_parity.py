"""The NixOS tree, the Debian tree and the Plan say the same, row by row.

A row is a fact that all three must agree on. NixOS' side is what Nix evaluates the modules to,
Debian's what the rendered files say; neither is read by the code that rendered it.
"""

from __future__ import annotations

import configparser
import copy
import io
import json
import re
import shlex
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyrage
import pytest
import yaml

from ravectl import images, model, sops, vault
from ravectl.model import (
    AUDIT_A_SECOND,
    AUDIT_WAITING,
    Access,
    Activation,
    EngineName,
    Plan,
    RenderedTree,
    SecretKind,
)
from tests import nixos

# of full-pipe what both can have; what is of NixOS alone is held below
PLANS = {p.profile: p for p in (nixos.shipped()[0], nixos.on_both())}


# --- reading ------------------------------------------------------------------------------------


class Unit(dict[str, list[str]]):
    """A unit's settings by key, over all its sections; a key may stand several times."""

    def __init__(self, text: str) -> None:
        super().__init__()
        for line in text.splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith(("#", "[")):
                self.setdefault(key, []).append(value)

    def one(self, key: str) -> str:
        return self[key][-1]


def nix_values(settings: dict[str, Any], skip: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Settings of a unit as NixOS writes them: each a list of texts."""
    return {
        k: [
            {"True": "yes", "False": "no"}.get(str(x), str(x))
            for x in (v if isinstance(v, list) else [v])
        ]
        for k, v in settings.items()
        if not k.startswith(skip)
    }


def debian_values(unit: Unit, skip: tuple[str, ...]) -> dict[str, list[str]]:
    """Settings of a unit; where one is said more than once and is no list, the last."""
    lists = ("SystemCallFilter",)
    return {
        k: v if k in lists else v[-1:]
        for k, v in unit.items()
        if not k.startswith((*skip, "Start"))
    }


Block = list[tuple[list[str], "Block"]]


def nginx_blocks(text: str) -> Block:
    """nginx's configuration as directives, each with the block below it."""
    words = re.findall(r'#[^\n]*|"(?:\\.|[^"\\])*"|[{};]|[^\s{};]+', text)
    stack: list[Block] = [[]]
    current: list[str] = []
    for word in words:
        if word.startswith("#"):
            continue
        if word == ";":
            stack[-1].append((current, []))
            current = []
        elif word == "{":
            block: Block = []
            stack[-1].append((current, block))
            stack.append(block)
            current = []
        elif word == "}":
            stack.pop()
        else:
            current.append(word)
    assert len(stack) == 1, "a block is not closed"
    assert not current, f"{current} has no end"
    return stack[0]


def below(block: Block, name: str) -> Block:
    return next(inner for words, inner in block if words == [name])


def lines_of(block: Block) -> set[str]:
    """Directives without a block, and maps, each as one text."""
    found = set()
    for words, inner in block:
        if not inner:
            found.add(" ".join(words))
        elif words[0] == "map":
            found.add(" ".join([*words, *sorted(" ".join(w) for w, _ in inner)]))
    return found


Server = dict[str, set[str]]  # location -> its directives; "" is the server itself


def server(block: Block) -> Server:
    found = {"": {" ".join(words) for words, inner in block if not inner}}
    for words, inner in block:
        if words[0] == "location":
            found[" ".join(words[1:])] = {" ".join(w) for w, _ in inner}
    return found


@dataclass
class Debian:
    """Debian's files."""

    tree: RenderedTree
    plan: Plan

    def text(self, path: str) -> str:
        return self.tree.file(path).content

    def unit(self, service: str) -> Unit:
        name = self.plan.service(service).unit["debian"]
        folder = "etc/systemd/system"
        paths = {f.path for f in self.tree.files}
        path = f"{folder}/{name}.d/rave.conf"
        return Unit(self.text(path if path in paths else f"{folder}/{name}"))

    def socket(self, name: str) -> Unit:
        return Unit(self.text(f"etc/systemd/system/{name}.socket"))

    @property
    def http(self) -> Block:
        return below(nginx_blocks(self.text("etc/nginx/nginx.conf")), "http")

    def http_upstreams(self) -> dict[str, set[str]]:
        return {
            words[1]: {w[1] for w, _ in inner if w[0] == "server"}
            for words, inner in self.http
            if words[0] == "upstream"
        }

    def servers(self) -> dict[str, Server]:
        found = {}
        for words, inner in self.http:
            if words == ["server"]:
                names = {w[0]: w[1] for w, _ in inner if len(w) > 1}
                found[names.get("server_name", "status")] = server(inner)
        return found

    def sshd(self) -> dict[str, str]:
        rows = [line.split(None, 1) for line in self.text("etc/ssh/sshd_config").splitlines()]
        return {r[0]: r[1] for r in rows if len(r) == 2 and r[0] != "#"}

    def postgresql(self) -> dict[str, str]:
        found = {}
        for line in self.text("etc/postgresql/17/main/postgresql.conf").splitlines():
            key, equals, value = line.partition(" = ")
            if equals and not line.startswith("#"):
                found[key] = value.strip("'")
        return found

    def words(self, package: str) -> list[str]:
        return shlex.split(Unit(self.text(f"etc/default/{package}")).one("ARGS").strip('"'))

    def flags(self, package: str) -> dict[str, str]:
        return dict((f"{w}=").split("=")[:2] for w in self.words(package))

    def grafana(self) -> dict[str, dict[str, str]]:
        ini = configparser.RawConfigParser(interpolation=None)
        ini.read_string(self.text("etc/grafana/grafana.ini"))
        return {name: dict(ini[name]) for name in ini.sections()}

    def secrets(self) -> dict[str, tuple[str, str, str]]:
        """Owner, group and mode of each file of a bundle that has all."""
        names = [s.name for s in self.plan.delivered()]
        for s in self.plan.delivered():
            names += [s.previous, f"{s.previous}-until"] if s.grace_hours else []
        identity, recipient = sops.new_identity()
        bundle = vault.bundle(self.plan, dict.fromkeys(names, "x"), 7, recipient)
        key = pyrage.x25519.Identity.from_str(identity)
        plain = io.BytesIO(pyrage.decrypt(bundle.split(b"\n", 1)[1], [key]))
        with tarfile.open(fileobj=plain) as tar:
            files = [m for m in tar.getmembers() if m.isfile()]
        return {m.name: (m.uname, m.gname, f"{m.mode:04o}") for m in files}


@dataclass
class NixOS:
    """NixOS' options."""

    options: dict[str, Any]
    plan: Plan

    def at(self, path: str) -> Any:
        found = self.options
        for key in path.split("."):
            found = found[key]
        return found

    def service(self, name: str) -> dict[str, Any]:
        unit = self.plan.service(name).unit["nix"].removesuffix(".service")
        return dict(self.at("systemd.services")[unit])

    def config(self, name: str) -> dict[str, Any]:
        return dict(self.service(name)["serviceConfig"])

    def etc(self, path: str) -> str:
        source = self.at("environment.etc")[path]["source"]
        # a path of the store, copied there by Nix: the same file lies in the flake
        name = str(source).rpartition("-")[2]
        folder = nixos.flake() / "modules" / self.plan.hostname / "files"
        return (folder / name).read_text()

    def servers(self) -> dict[str, Server]:
        """As NixOS writes them; what it adds to every server stands in its own module."""
        found = {}
        for name, host in self.at("services.nginx.virtualHosts").items():
            text = host.get("extraConfig", "")
            for row in host["listen"]:
                everywhere = row["addr"] == "0.0.0.0"
                words = [str(row["port"]) if everywhere else f"{row['addr']}:{row['port']}"]
                words += ["ssl"] * row.get("ssl", False)
                words += ["default_server"] * host.get("default", False)
                text += f"listen {' '.join(words)};"
            text += "http2 on;" * (name != "status" and host["http2"])
            text += f"server_name {name};" * (name != "status")
            text += "root /usr/share/rave/www;" * ("root" in host)
            for path, row in host["locations"].items():
                text += f"location {path} {{ {row.get('extraConfig', '')}"
                for key, directive in (
                    ("return", "return"), ("tryFiles", "try_files"), ("proxyPass", "proxy_pass"),
                ):  # fmt: skip
                    text += f"{directive} {row[key]};" if key in row else ""
                text += "}"
            found[name] = server(nginx_blocks(text))
        return found


def sides(profile: str) -> tuple[Plan, Debian, NixOS]:
    plan = PLANS[profile]
    debian = Debian(images.render_debian(plan), plan)
    return plan, debian, NixOS(nixos.values(plan.hostname), plan)


# --- rows ---------------------------------------------------------------------------------------

EXPORTERS = {
    "node": "prometheus-node-exporter",
    "nginx": "prometheus-nginx-exporter",
    "postgres": "prometheus-postgres-exporter",
    "blackbox": "prometheus-blackbox-exporter",
}
MONITORING = (
    "prometheus", "alertmanager", "victoriametrics", "pushgateway", "node-exporter",
    "nginx-exporter", "postgres-exporter", "blackbox-exporter", "mtail",
)  # fmt: skip
OURS = ("kanban", "router", "dispatcher")  # services that neither distribution has

Row = Callable[[Plan, Debian, NixOS], tuple[Any, ...]]
ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    """A fact, as (Plan's or what it follows from, Debian's, NixOS')."""
    ROWS[function.__name__] = function
    return function


@row
def firewall(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    def rules(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines() if line.strip()]

    table = nix.at("networking.nftables.tables.rave")
    there = rules(debian.text("etc/nftables.conf"))
    start = there.index(f"table {table['family']} rave {{")
    assert nix.at("networking.nftables.flushRuleset") == ("flush ruleset" in there)
    return there[start + 1 : -1], rules(table["content"])


@row
def open_ports(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    def opened(text: str) -> set[int]:
        found = re.findall(r"tcp dport \{([\d, ]+)\} .*accept", text)
        return {int(p) for ports in found for p in ports.split(",")}

    assert not nix.at("networking.firewall.enable"), "two firewalls"
    return (
        set(plan.network.open_ports),
        opened(debian.text("etc/nftables.conf")),
        opened(nix.at("networking.nftables.tables.rave.content")),
    )


@row
def listeners(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Address and port of everything that listens."""
    every = {f"0.0.0.0:{p}" for p in plan.network.open_ports}
    expected = every | {f"127.0.0.1:{p}" for p in plan.listeners()} - {
        f"127.0.0.1:{p}" for p in plan.network.open_ports
    }
    assert debian.sshd()["AddressFamily"] == "inet"
    assert nix.at("networking.enableIPv6") is False
    here = {f"0.0.0.0:{debian.sshd()['Port']}"}
    for words, inner in debian.http:
        if words == ["server"]:
            found = next(w[1] for w, _ in inner if w[0] == "listen")
            here.add(found if ":" in found else f"0.0.0.0:{found}")
    env = dict(w.split("=") for w in debian.unit("kanban").one("Environment").split())
    here.add(f"{env['HOST']}:{env['PORT']}")
    router = json.loads(debian.text("etc/rave/router.json"))
    here.add(f"{router['HOST']}:{router['PORT']}")
    here.add(debian.socket("rave-dispatcher").one("ListenStream"))
    here.add(f"{debian.postgresql()['listen_addresses']}:{debian.postgresql()['port']}")
    for package in ("prometheus", "prometheus-alertmanager", *EXPORTERS.values()):
        here.add(debian.flags(package)["--web.listen-address"])
    here.add(debian.flags("prometheus-pushgateway")["--web.listen-address"])
    here.add(debian.flags("victoria-metrics")["-httpListenAddr"])
    here.add(_mtail_listens(debian.unit("mtail").one("ExecStart")))
    if plan.has("grafana"):
        where = debian.grafana()["server"]
        here.add(f"{where['http_addr']}:{where['http_port']}")
    return expected, here, _nixos_listeners(nix)


def _nixos_listeners(nix: NixOS) -> set[str]:
    there = {f"0.0.0.0:{p}" for p in nix.at("services.openssh.ports")}
    for host in nix.at("services.nginx.virtualHosts").values():
        there |= {f"{row['addr']}:{row['port']}" for row in host["listen"]}
    env = nix.service("kanban")["environment"]
    there.add(f"{env['HOST']}:{env['PORT']}")
    router = json.loads(nix.etc("rave/router.json"))
    there.add(f"{router['HOST']}:{router['PORT']}")
    there |= set(nix.at("systemd.sockets")["rave-dispatcher"]["listenStreams"])
    settings = nix.at("services.postgresql.settings")
    there.add(f"{settings['listen_addresses']}:{settings['port']}")
    own = ("services.prometheus", "services.prometheus.alertmanager")
    for path in (*own, *(f"services.prometheus.exporters.{e}" for e in EXPORTERS)):
        there.add(f"{nix.at(path)['listenAddress']}:{nix.at(path)['port']}")
    there.add(nix.at("services.prometheus.pushgateway.web.listen-address"))
    there.add(nix.at("services.victoriametrics.listenAddress"))
    there.add(_mtail_listens(nix.config("mtail")["ExecStart"]))
    if nix.plan.has("grafana"):
        where = nix.at("services.grafana.settings.server")
        there.add(f"{where['http_addr']}:{where['http_port']}")
    return there


def _mtail_listens(command: str) -> str:
    words = command.split()
    return ":".join(words[words.index(f"--{key}") + 1] for key in ("address", "port"))


@row
def limits(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    keys = ("MemoryMax", "CPUQuota", "TasksMax", "OOMScoreAdjust")
    expected = {
        s.name: (
            f"{s.limits.memory_mb}M", f"{s.limits.cpu_percent}%", str(s.limits.tasks),
            str(s.limits.oom_score_adjust),
        )
        for s in plan.services
    }  # fmt: skip
    here = {s.name: tuple(debian.unit(s.name).one(k) for k in keys) for s in plan.services}
    there = {s.name: tuple(str(nix.config(s.name)[k]) for k in keys) for s in plan.services}
    return expected, here, there


@row
def cpu_weights(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    here = {s.name: debian.unit(s.name).get("CPUWeight", [""])[-1] for s in plan.services}
    there = {s.name: str(nix.config(s.name).get("CPUWeight", "")) for s in plan.services}
    return here, there


@row
def sandbox(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """All that units which are wholly ours say of their processes."""
    skip = ("Exec", "Environment", "Description", "After", "Requires", "Want", "LoadCredential")
    here = {s: debian_values(debian.unit(s), skip) for s in OURS}
    return here, {s: nix_values(nix.config(s), skip) for s in OURS}


@row
def returning(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """How a service that died comes again, and when it is given up."""
    keys = ("Restart", "RestartSec", "RestartSteps", "RestartMaxDelaySec")
    limits = ("StartLimitIntervalSec", "StartLimitBurst")
    expected = (["on-failure", "1s", "4", "16s"], ["1h", "60"])
    here = {
        s.name: ([debian.unit(s.name).one(k) for k in keys],
                 [debian.unit(s.name).one(k) for k in limits])
        for s in plan.services
    }  # fmt: skip
    there = {
        s.name: ([nix.config(s.name)[k] for k in keys],
                 [nix.service(s.name)["unitConfig"][k] for k in limits])
        for s in plan.services
    }  # fmt: skip
    units = nix.at("systemd.services")["rave-units"]["unitConfig"]
    assert [units[k] for k in limits] == expected[1]
    exporter = nix.config("node-exporter")["ProtectHome"]
    assert debian.unit("node-exporter").one("ProtectHome") == exporter
    return {s.name: expected for s in plan.services}, here, there


@row
def login_daemon(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    keys = (
        "LockPersonality", "RestrictRealtime", "SystemCallArchitectures",
        "RestrictAddressFamilies", "LimitCORE",
    )  # fmt: skip
    there = nix_values(nix.config("ssh"))
    return [debian.unit("ssh").one(k) for k in keys], [there[k][0] for k in keys]


@row
def sockets(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    names = ("rave-dispatcher", "rave-console", "rave-launcher")
    wants = "etc/systemd/system/sockets.target.wants"
    for name in names:
        assert debian.tree.file(f"{wants}/{name}.socket").target
    here = {name: {k: v[-1] for k, v in debian.socket(name).items()} for name in names}
    there = {}
    for name, row in nix.at("systemd.sockets").items():
        flags = {k: {True: "yes"}.get(v, str(v)) for k, v in row["socketConfig"].items()}
        (wanted,), (stream,) = row["wantedBy"], row["listenStreams"]
        there[name] = {
            **flags, "Description": row["description"], "WantedBy": wanted, "ListenStream": stream,
        }  # fmt: skip
    return here, there


@row
def launcher(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Root's side of an agent task, which the Plan has no row for: it runs when it is asked."""
    unit = Unit(debian.text("etc/systemd/system/rave-launcher@.service"))
    row = nix.at("systemd.services")["rave-launcher@"]
    there = nix_values(row["serviceConfig"], ("ExecStart",))
    there |= {k: [v] for k, v in row["unitConfig"].items()}
    there |= {
        "Description": [row["description"]],
        "Requires": row["requires"],
        "After": row["after"],
        "Before": row["before"],
    }
    tasks = Unit(debian.text("etc/systemd/system/rave-tasks.target"))
    assert nix.at("systemd.targets") == {"rave-tasks": {"description": tasks.one("Description")}}
    ours, theirs = debian.unit("dispatcher"), nix.service("dispatcher")
    assert ours["Wants"] == theirs["wants"] == row["before"]
    assert "rave-tasks.target" in theirs["after"]
    assert "rave-tasks.target" in ours.one("After").split()
    return debian_values(unit, ("Exec",)), there


@row
def dispatcher(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """The same, but for what units are called."""

    def read(text: str, engine: str) -> Any:
        document = yaml.safe_load(text)
        for unit in document["console"]["units"]:
            assert unit["unit"] == plan.service(unit["name"]).unit[engine]
            unit["unit"] = unit["name"]
        return document

    return (
        read(debian.text("etc/rave/dispatcher.yaml"), "debian"),
        read(nix.etc("rave/dispatcher.yaml"), "nix"),
    )


@row
def console(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """The console's socket is the ingress's alone, and nginx asks there."""
    here, there = debian.socket("rave-console"), nix.at("systemd.sockets")["rave-console"]
    expected = (model.CONSOLE_SOCKET, "www-data", "0600", "console")
    servers = [
        debian.http_upstreams()["local-console"],
        set(nix.at("services.nginx.upstreams.local-console.servers")),
    ]
    assert servers == [{f"unix:{model.CONSOLE_SOCKET}"}] * 2
    assert plan.service("ingress").user == "www-data"
    keys = ("SocketUser", "SocketMode", "FileDescriptorName")
    return (
        expected,
        (here.one("ListenStream"), *(here.one(k) for k in keys)),
        (there["listenStreams"][0], *(there["socketConfig"][k] for k in keys)),
    )


@row
def credentials(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    return debian.unit("router")["LoadCredential"], nix.config("router")["LoadCredential"]


@row
def egress(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    def closed(deny: object) -> bool:
        return deny == "any"

    return (
        not plan.network.egress,
        closed(debian.unit("router").get("IPAddressDeny", [""])[-1]),
        closed(nix.config("router").get("IPAddressDeny")),
    )


@row
def users(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Of services whose user is ours to say."""
    expected = {n: plan.service(n).user for n in ("ingress", "kanban", "router")}
    nginx = nginx_blocks(debian.text("etc/nginx/nginx.conf"))
    here = {n: debian.unit(n).one("User") for n in ("kanban", "router")}
    here["ingress"] = next(w[1] for w, _ in nginx if w[0] == "user")
    there = {n: nix.config(n)["User"] for n in ("kanban", "router")}
    there["ingress"] = nix.at("services.nginx.user")
    for e in EXPORTERS:
        at = f"services.prometheus.exporters.{e}"
        assert nix.at(f"{at}.user") == nix.at(f"{at}.group") == plan.service(f"{e}-exporter").user
    return expected, here, there


@row
def accounts(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Debian's are made of the Plan with its base."""
    known = nix.at("users.users")
    assert not nix.at("users.mutableUsers")
    assert not any("assword" in key for account in known.values() for key in account)
    there = {
        name: (a["uid"], nix.at("users.groups")[name]["gid"], a["home"], "isNormalUser" in a)
        for name, a in known.items()
        if "uid" in a  # www-data is given one by NixOS
    }
    return {
        a.name: (a.uid, a.uid, a.home, a.home.startswith("/home/")) for a in plan.accounts
    }, there


@row
def sudo(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    lines = debian.text("etc/sudoers.d/rave").splitlines()
    found = [re.match(r"(\S+) ALL=\(ALL:ALL\) NOPASSWD: ALL", line) for line in lines]
    rules = nix.at("security.sudo.extraRules")
    there = [
        u
        for r in rules
        for u in r["users"]
        if r["commands"] == [{"command": "ALL", "options": ["NOPASSWD"]}]
    ]
    expected = [a.name for a in plan.accounts if a.sudo]
    return expected, [m[1] for m in found if m], there


@row
def needed_secrets(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """The files without which a service does not start."""
    required = vault.required(plan)
    expected = {s.name: [n for n in s.secrets if n in required] for s in plan.services}
    here = {s.name: debian.unit(s.name).get("ExecCondition", [""])[-1] for s in plan.services}
    there = {s.name: nix.config(s.name).get("ExecCondition", "") for s in plan.services}
    for command in (*here.values(), *there.values()):
        assert not command or command.split()[0].endswith("need")
    return (
        expected,
        {name: command.split()[1:] for name, command in here.items()},
        {name: command.split()[1:] for name, command in there.items()},
    )


@row
def order(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """What a unit waits for, by our names."""
    names = {"ssh.service": "ssh", "sshd.service": "ssh", "rave-secrets.service": "secrets"}
    names["sops-install-secrets.service"] = "secrets"
    names |= {s.unit[e]: s.name for s in plan.services for e in EngineName}

    # NixOS loads AppArmor's policy before it starts any service
    def ours(units: Iterable[str]) -> set[str]:
        return {names.get(u, u) for u in units} - {"rave-apparmor.service"}

    here, there = {}, {}
    for s in plan.services:
        unit, module = debian.unit(s.name), nix.service(s.name)
        here[s.name] = [ours(" ".join(unit.get(k, [])).split()) for k in ("After", "Requires")]
        there[s.name] = [ours(module.get(k, [])) for k in ("after", "requires")]
    return here, there


@row
def secrets(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    expected = {}
    for s in plan.delivered():
        more = [s.previous, f"{s.previous}-until"] if s.grace_hours else []
        expected |= dict.fromkeys([s.name, *more], (s.owner, s.group, s.mode))
    there = {
        name: (row["owner"], row["group"], row["mode"])
        for name, row in nix.at("sops.secrets").items()
    }
    return expected, debian.secrets(), there


@row
def retention(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    flags = debian.flags("prometheus")
    extra = dict(f.split("=") for f in nix.at("services.prometheus.extraFlags"))
    size, age = "--storage.tsdb.retention.size", "--storage.tsdb.retention.time"
    more = "--query.max-concurrency"
    return (
        (f"{plan.retention.metrics_days}d", f"{plan.retention.metrics_mb}MB", "4"),
        (flags[age], flags[size], flags[more]),
        (nix.at("services.prometheus.retentionTime"), extra[size], extra[more]),
    )


@row
def scrape_jobs(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    written = yaml.safe_load(debian.text("etc/prometheus/prometheus.yml"))
    assert written["global"] == nix.at("services.prometheus.globalConfig")
    assert written["global"]["scrape_interval"] == f"{plan.scrape_seconds}s"
    there = nix.at("services.prometheus.scrapeConfigs")
    for job, row in zip(plan.scrape_jobs, there, strict=True):
        seconds = f"{job.every_seconds}s"
        assert (row["job_name"], row["metrics_path"]) == (job.name, job.path)
        assert (row["scrape_interval"], row["scrape_timeout"]) == (seconds, seconds)
        assert row.get("honor_labels", False) == job.honor_labels
        assert row.get("params", {}).get("collect[]", []) == list(job.collect)
        kept = [r["regex"] for r in row.get("metric_relabel_configs", [])]
        assert kept == ([job.keep] if job.keep else [])
        targets = [(t["labels"]["service"], t["targets"]) for t in row["static_configs"]]
        assert targets == (
            [(p.service, [p.url]) for p in job.probes]
            or [(plan.serving(job.port).name, [f"127.0.0.1:{job.port}"])]
        )
    return written["scrape_configs"], there


@row
def rules_and_routes(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Rules, alert routes, probes and counting: the same files."""
    written = yaml.safe_load(debian.text("etc/prometheus/prometheus.yml"))
    folder = nixos.flake() / "modules" / plan.hostname / "files"
    names = ("alerts.yml", "slo.yml")
    assert written["rule_files"] == [f"/etc/prometheus/{n}" for n in names]
    assert nix.at("services.prometheus.checkConfig") == "syntax-only"
    here = [debian.text(f"etc/prometheus/{n}") for n in (*names, "blackbox.yml")]
    here += [debian.text("etc/prometheus/alertmanager.yml"), debian.text("etc/mtail/nginx.mtail")]
    here += [debian.text("etc/rave/postgres-queries.yml"), debian.text("usr/lib/rave/units")]
    files = [str(p) for p in nix.at("services.prometheus.ruleFiles")]
    files.append(str(nix.at("services.prometheus.exporters.blackbox.configFile")))
    there = [(folder / f.rpartition("-")[2]).read_text() for f in files]
    there += [nix.at("services.prometheus.alertmanager.configText")]
    assert nix.config("mtail")["ExecStart"].split()[2].endswith("-mtail")
    there += [(folder / "mtail/nginx.mtail").read_text(), nix.etc("rave/postgres-queries.yml")]
    units = (folder.parent / "scripts/units.sh").read_text()
    # where the names of units differ
    for s in plan.services:
        units = units.replace(f" {s.unit['nix']}\n", f" {_group(s.unit['debian'])}\n")
    return [written["alerting"]["alertmanagers"], written["remote_write"], *here], [
        nix.at("services.prometheus.alertmanagers"), nix.at("services.prometheus.remoteWrite"),
        *there, units,
    ]  # fmt: skip


def _group(unit: str) -> str:
    """Where a unit's control group is, below system.slice."""
    prefix, template, _ = unit.partition("@")
    return f"system-{prefix}.slice/{unit}" if template else unit


@row
def grafana(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Its settings, data sources and dashboards, and the password that it is given."""
    if not plan.has("grafana"):
        assert not any("grafana" in f.path for f in debian.tree.files)
        assert "grafana" not in nix.at("services")
        return [], []
    folder = nixos.flake() / "modules" / plan.hostname
    here, options = debian.grafana(), nix.at("services.grafana")
    there = {
        section: {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in rows.items()}
        for section, rows in options["settings"].items()
    }
    home = plan.dashboards[0]
    assert here.pop("dashboards") == {
        "default_home_dashboard_path": f"/usr/share/rave/dashboards/{home}.json"
    }
    (place,) = there.pop("dashboards").values()
    assert re.fullmatch(rf"/.*-dashboards/{home}\.json", place)
    provision = nix.at("services.grafana.provision")
    (ours,) = provision["dashboards"]["settings"]["providers"]
    (written,) = yaml.safe_load(debian.text("etc/grafana/provisioning/dashboards/rave.yaml"))[
        "providers"
    ]
    assert written.pop("options") == {"path": "/usr/share/rave/dashboards"}
    assert str(ours["options"]["path"]).endswith("dashboards")
    ours = {k: v for k, v in ours.items() if k != "options"}
    sources = yaml.safe_load(debian.text("etc/grafana/provisioning/datasources/rave.yaml"))
    boards = {
        f.path.rpartition("/")[2]: f.content
        for f in debian.tree.files
        if f.path.startswith("usr/share/rave/dashboards/")
    }
    assert set(boards) == {f"{uid}.json" for uid in plan.dashboards}
    assert debian.unit("grafana").one("ExecStartPre") == "/usr/lib/rave/grafana-password"
    assert nix.service("grafana")["preStart"].endswith("-grafana-password")
    (program,) = nix.service("grafana")["path"]
    assert str(program).endswith("-grafana")
    return (
        [here, written, sources["datasources"], boards],
        [there, ours, provision["datasources"]["settings"]["datasources"],
         {p.name: p.read_text() for p in (folder / "files/dashboards").glob("*.json")}],
    )  # fmt: skip


@row
def critical_metrics(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    written = yaml.safe_load(debian.text("etc/prometheus/prometheus.yml"))
    flags = debian.flags("victoria-metrics")
    long = f"{plan.retention.critical_metrics_days}d"
    assert plan.remote_write[0].startswith(f"http://{flags['-httpListenAddr']}/")
    there = nix.at("services.victoriametrics")
    return (
        (list(plan.remote_write), long),
        ([r["url"] for r in written["remote_write"]], flags["-retentionPeriod"]),
        ([r["url"] for r in nix.at("services.prometheus.remoteWrite")], there["retentionPeriod"]),
    )


@row
def program_flags(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Every word that is not of the places which each distribution has of its own."""
    own = (
        "--web.listen-address", "--config.file", "--storage.path", "--storage.tsdb.path",
        "--storage.tsdb.retention.time", "--persistence.file", "-storageDataPath",
        "-httpListenAddr", "-retentionPeriod",
    )  # fmt: skip
    at = {
        "prometheus": "services.prometheus.extraFlags",
        "prometheus-alertmanager": "services.prometheus.alertmanager.extraFlags",
        "prometheus-pushgateway": "services.prometheus.pushgateway.extraFlags",
        "victoria-metrics": "services.victoriametrics.extraOptions",
        "prometheus-node-exporter": "services.prometheus.exporters.node.extraFlags",
        "prometheus-postgres-exporter": "services.prometheus.exporters.postgres.extraFlags",
        "prometheus-blackbox-exporter": "services.prometheus.exporters.blackbox.extraFlags",
    }
    here = {p: {w for w in debian.words(p) if w.split("=")[0] not in own} for p in at}
    there = {p: set(nix.at(path)) for p, path in at.items()}
    node = nix.at("services.prometheus.exporters.node")
    there["prometheus-node-exporter"] |= {f"--collector.{c}" for c in node["enabledCollectors"]}
    uri = debian.flags("prometheus-nginx-exporter")["--nginx.scrape-uri"]
    assert uri == nix.at("services.prometheus.exporters.nginx.scrapeUri")
    assert nix.at("services.prometheus.pushgateway.persistMetrics")
    commands = [debian.unit("mtail").one("ExecStart"), nix.config("mtail")["ExecStart"]]
    for side, command in zip((here, there), commands, strict=True):
        words = command.split()[1:]
        del words[words.index("--progs") + 1]  # a folder of its own
        side["mtail"] = set(words)
    return here, there


@row
def go_programs(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Their collectors know their limits."""
    here, there = {}, {}
    for name in _measuring(plan):
        here[name] = dict(w.split("=") for w in debian.unit(name).one("Environment").split())
        there[name] = dict(nix.service(name)["environment"])
        limit = plan.service(name).limits
        assert here[name]["GOMEMLIMIT"] == f"{limit.memory_mb * 3 // 4}MiB"
    default = Unit(debian.text("etc/default/prometheus-postgres-exporter"))
    here["postgres-exporter"] |= {k: v[-1] for k, v in default.items() if k.startswith("DATA_")}
    assert nix.at("services.prometheus.exporters.postgres.dataSourceName") == ""
    return here, there


def _measuring(plan: Plan) -> tuple[str, ...]:
    return (*MONITORING, *(("grafana",) if plan.has("grafana") else ()))


@row
def monitoring_is_local(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Only Prometheus (a remote endpoint) and Alertmanager (receivers) may reach the outside."""
    names = _measuring(plan)
    closed = {n: n != "prometheus" for n in names}
    closed["alertmanager"] = not plan.network.egress
    here = {n: debian.unit(n).get("IPAddressDeny") == ["any"] for n in names}
    there = {n: nix.config(n).get("IPAddressDeny") == "any" for n in names}
    for n in names:
        assert debian.unit(n).get("IPAddressAllow", [None])[-1] == nix.config(n).get(
            "IPAddressAllow"
        )
    return closed, here, there


@row
def counting_units(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """mtail, rave-units and rave-bans, whose units are ours."""
    no = ("Exec", "Environment", "WantedBy", "After", "Description")
    units = {
        "mtail": debian.unit("mtail"),
        "rave-units": Unit(debian.text("etc/systemd/system/rave-units.service")),
        "rave-bans": Unit(debian.text("etc/systemd/system/rave-bans.service")),
    }
    here = {name: debian_values(unit, no) for name, unit in units.items()}
    here["mtail"]["User"] = [plan.service("mtail").user]  # its package's
    services = nix.at("systemd.services")
    there = {name: nix_values(services[name]["serviceConfig"], no) for name in units}
    wants = "etc/systemd/system/multi-user.target.wants"
    for name, unit in units.items():
        assert debian.tree.file(f"{wants}/{name}.service").target
        assert services[name]["wantedBy"] == ["multi-user.target"]
        after = [w.replace("ssh.service", "sshd.service") for w in unit.one("After").split()]
        assert services[name]["after"] == after
    for name in ("rave-units", "rave-bans"):
        assert services[name]["description"] == units[name].one("Description")
    assert services["mtail"]["description"] == plan.service("mtail").description
    assert nix.at("users.users.mtail.group") == "mtail"
    assert nix.at("users.groups")["mtail"] == {}
    return here, there


@row
def kernel_settings(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    lines = debian.text("etc/sysctl.d/90-rave.conf").splitlines()
    here = dict(line.split(" = ") for line in lines if line and line[0] != "#")
    assert here == plan.hardening.kernel("debian")
    return plan.hardening.kernel("nix"), nix.at("boot.kernel.sysctl")


@row
def blocked_modules(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    text = debian.text("etc/modprobe.d/rave.conf")
    for name in plan.hardening.blocked_modules:
        assert f"\nblacklist {name}\ninstall {name} /bin/true\n" in text
    return text, nix.at("boot.extraModprobeConfig")


@row
def confinement(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """AppArmor's profiles, and who is held to which."""
    text = debian.text("etc/apparmor.d/rave")
    assert nix.at("security.apparmor.enable")
    names = plan.hardening.profiles
    assert [f"\nprofile {p} " in text for p in names.values()] == [True] * len(names)
    here = {n: debian.unit(n).get("AppArmorProfile") for n in names}
    there = {n: [nix.config(n)["AppArmorProfile"]] for n in names}
    return (
        (text, {n: [p] for n, p in names.items()}),
        (text, here),
        (nix.at("security.apparmor.policies.rave.profile"), there),
    )


@row
def kernel_notes(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Audit rules; each engine has its own sudo and its own place for sudo's rules."""
    lines = debian.text("etc/audit/rave.rules").splitlines()
    given = tuple(line for line in lines if line.startswith("-a "))
    (backlog,) = (line for line in lines if line.startswith("-b "))
    (rate,) = (line for line in lines if line.startswith("-r "))
    assert (lines[1], lines[-1]) == ("-D", "-e 1")
    assert given == plan.hardening.audit["debian"]
    assert nix.at("security.audit.enable") is True
    assert tuple(nix.at("security.audit.rules")) == plan.hardening.audit["nix"]
    here = [r.replace("/usr/bin/sudo", "SUDO") for r in given if "sudoers.d" not in r]
    there = [r.replace("/run/wrappers/bin/sudo", "SUDO") for r in nix.at("security.audit.rules")]
    return (
        (f"-b {AUDIT_WAITING}", f"-r {AUDIT_A_SECOND}", here),
        (backlog, rate, here),
        (
            f"-b {nix.at('security.audit.backlogLimit')}",
            f"-r {nix.at('security.audit.rateLimit')}",
            there,
        ),
    )


@row
def clock(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    folder = "etc/systemd/system"
    unit = Unit(debian.text(f"{folder}/rave-clock.service"))
    row = nix.at("systemd.services.rave-clock")
    assert not nix.at("services.timesyncd.enable")
    assert (unit["After"], row["after"]) == (["ssh.service"], ["sshd.service"])
    assert debian.tree.file(f"{folder}/multi-user.target.wants/rave-clock.service").target
    assert row["wantedBy"] == unit["WantedBy"]
    assert [row["unitConfig"][k] for k in ("StartLimitIntervalSec", "StartLimitBurst")] == [
        unit.one("StartLimitIntervalSec"), unit.one("StartLimitBurst"),
    ]  # fmt: skip
    skip = ("Exec", "After", "WantedBy", "Description")
    assert row["description"] == unit.one("Description")
    return debian_values(unit, skip), nix_values(row["serviceConfig"], skip)


# by its modules of 26.05, as far as a machine of ours has them turned on
SETUID_OF_NIXOS = {
    "dbus-daemon-launch-helper", "mount", "newgidmap", "newgrp", "newuidmap", "sg", "su", "sudo",
    "sudoedit", "umount", "unix_chkpwd",
}  # fmt: skip


@row
def setuid_programs(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """On Debian the image has one; NixOS' wrappers lose theirs."""
    wrappers = nix.at("security.wrappers")
    assert plan.hardening.setuid["debian"] == ("/usr/bin/sudo",)
    kept = {path.rpartition("/")[2] for path in plan.hardening.setuid["nix"]}
    assert set(wrappers) == SETUID_OF_NIXOS - kept
    return {False}, {value["setuid"] for value in wrappers.values()}


@row
def agents_disk_and_slice(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    folder = "etc/systemd/system"
    names = ("home-agent.mount", "agents.slice", "rave-agents-disk.service")
    units = [Unit(debian.text(f"{folder}/{n}")) for n in names]
    skip = ("Exec", "WantedBy", "After", "Before", "Description")
    here = [debian_values(u, skip) for u in units]
    here[0]["After"] = units[0]["After"][0].split()
    here[0]["Requires"] = units[0]["Requires"][0].split()
    (mount,) = nix.at("systemd.mounts")
    disk = nix.at("systemd.services.rave-agents-disk")
    there: list[dict[str, Any]] = [
        {
            "What": [mount["what"]], "Where": [mount["where"]], "Type": [mount["type"]],
            "Options": [mount["options"]], "Requires": mount["requires"],
            "Conflicts": mount["conflicts"], "After": mount["after"],
            **nix_values(mount["unitConfig"]),
        },
        nix_values(nix.at("systemd.slices.agents.sliceConfig")),
        {**nix_values(disk["serviceConfig"], skip), **nix_values(disk["unitConfig"])},
    ]  # fmt: skip
    said = [u.one("Description") for u in units]
    assert said == [
        mount["description"], nix.at("systemd.slices.agents.description"), disk["description"],
    ]  # fmt: skip
    order = [units[0]["Before"], units[2]["Before"], ["ssh.service"]]
    assert order == [mount["before"], disk["before"], units[2]["After"]]
    assert disk["after"] == ["sshd.service"]
    assert debian.tree.file(f"{folder}/multi-user.target.wants/{names[0]}").target
    assert mount["wantedBy"] == ["multi-user.target"]
    assert here[1]["MemoryMax"] == [f"{plan.hardening.agents.memory_mb}M"]
    return here, there


@row
def figures_of_secrets(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    path = "var/lib/prometheus/node-exporter/rave-secrets.prom"
    rules = [r.split() for r in nix.at("systemd.tmpfiles.rules")]
    (there,) = (r[-1] for r in rules if r[1] == f"/{path}")
    (folder,) = (r for r in rules if r[0] == "d")
    assert folder[1:4] == [f"/{path.rpartition('/')[0]}", "0755", "prometheus"]
    assert nix.config("alertmanager")["SupplementaryGroups"] == ["prometheus"]
    return debian.tree.file(path).target, there


@row
def sshd(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Every setting of Debian's file; NixOS says some by options of their own."""
    names = {"UseDns": "UseDNS", "Macs": "MACs"}
    there = {}
    for key, value in nix.at("services.openssh.settings").items():
        separator = " " if key == "AllowUsers" else ","
        text = separator.join(value) if isinstance(value, list) else value
        there[names.get(key, key)] = {True: "yes", False: "no"}.get(text, str(text))
    there["Port"] = " ".join(map(str, nix.at("services.openssh.ports")))
    there["AddressFamily"] = "any" if nix.at("networking.enableIPv6") else "inet"
    there["AuthorizedKeysFile"] = " ".join(nix.at("services.openssh.authorizedKeysFiles"))
    there["Subsystem"] = f"sftp {nix.at('services.openssh.sftpServerExecutable')}"
    key, _, value = nix.at("services.openssh.extraConfig").strip().partition(" ")
    there[key] = value
    assert nix.at("services.openssh.hostKeys") == [], "NixOS would make them"
    return debian.sshd(), there


@row
def announcement(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    command = debian.unit("ssh").one("ExecStartPost").removeprefix("/bin/sh -c ").strip("'")
    return command, nix.service("ssh")["postStart"].strip()


@row
def tls(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """nginx runs as itself on NixOS and is given a copy of the key."""
    here = {w[0]: " ".join(w[1:]) for w, b in debian.http if not b}
    copied = {"/run/rave-ingress/tls-key": "/run/secrets/ingress/tls-key"}
    hosts = [h for n, h in nix.at("services.nginx.virtualHosts").items() if n != "status"]
    assert all(h["onlySSL"] for h in hosts)
    (there,) = {
        (
            nix.at("services.nginx.sslProtocols"),
            h["sslCertificate"],
            copied[h["sslCertificateKey"]],
        )
        for h in hosts
    }
    expected = ("TLSv1.3", "/run/secrets/ingress/tls-cert", "/run/secrets/ingress/tls-key")
    keys = ("ssl_protocols", "ssl_certificate", "ssl_certificate_key")
    return expected, tuple(here[k] for k in keys), there


@row
def http_directives(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Headers, time limits, sizes: everything that holds for all of nginx."""
    there = lines_of(nginx_blocks(nix.at("services.nginx.commonHttpConfig")))
    options = nix.at("services.nginx")
    there |= {
        f"client_max_body_size {options['clientMaxBodySize']}",
        # NixOS' own map stands above everything that we can say, and knows no more than 128
        f"map_hash_bucket_size {2 * options['mapHashBucketSize']}",
        f"server_tokens {'on' if options['serverTokens'] else 'off'}",
        f"ssl_protocols {options['sslProtocols']}",
        "include /etc/nginx/mime.types",
        "default_type application/octet-stream",
        "ssl_certificate /run/secrets/ingress/tls-cert",
        "ssl_certificate_key /run/secrets/ingress/tls-key",
    }
    return lines_of(debian.http), there


@row
def routes(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    here = debian.servers()
    there = nix.servers()
    off = (Access.ANYONE, Access.NOBODY, Access.BEARER, Access.SIGNED)
    realms = dict.fromkeys(off, "off")
    realms[Access.SIGNED_IN_OR_KEY] = "$rave_router_realm"
    for r in plan.routes:
        host = here[r.host or "_"]
        exactly = f"= {r.path}"
        found = host[exactly] if exactly in host else host[r.path]
        realm = {f"auth_basic {realms[r.access]}"} if r.access in realms else set()
        assert {d for d in found if d.startswith("auth_basic")} == realm, r.name
        upstream = [d.split("/")[2] for d in found if d.startswith("proxy_pass")]
        wanted = "local-console" if r.upstream_socket else f"local-{r.upstream_port}"
        leads = r.upstream_socket or r.upstream_port
        assert upstream == ([wanted] if leads else []), r.name
    return here, there


@row
def nginx_itself(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    options = nix.at("services.nginx")
    assert options["user"] == options["group"]
    blocks = nginx_blocks(debian.text("etc/nginx/nginx.conf"))
    here = lines_of(blocks) | lines_of(below(blocks, "events"))
    there = lines_of(nginx_blocks(options["appendConfig"] + options["eventsConfig"]))
    there |= {
        f"user {options['user']}",
        f"error_log {options['logError']}",
        "pid /run/rave-ingress/nginx.pid",
    }
    return here, there


@row
def upstreams(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    here = {
        words[1]: {" ".join(w) for w, _ in inner}
        for words, inner in debian.http
        if words[0] == "upstream"
    }
    there = {
        name: {" ".join(w) for w, _ in nginx_blocks(row["extraConfig"])}
        | {" ".join(["server", s, *parameters]) for s, parameters in row["servers"].items()}
        for name, row in nix.at("services.nginx.upstreams").items()
    }
    return here, there


@row
def postgresql(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    def text(value: object) -> str:
        return {True: "on", False: "off"}.get(value, str(value))  # type: ignore[call-overload]

    # where NixOS has its own places, and its own unit to log for
    own = ("data_directory", "hba_file", "ident_file", "unix_socket_directories", "log_destination")
    here = {k: v for k, v in debian.postgresql().items() if k not in (*own, "logging_collector")}
    there = {k: text(v) for k, v in nix.at("services.postgresql.settings").items()}
    assert "--data-checksums" in nix.at("services.postgresql.initdbArgs")
    assert "scram-sha-256" in nix.at("services.postgresql.authentication")
    assert "trust" not in nix.at("services.postgresql.authentication")
    return here, there


@row
def router(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    return debian.text("etc/rave/router.json"), nix.etc("rave/router.json")


@row
def journal_manager_and_files(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    names = (
        "systemd/journald.conf.d/rave.conf", "systemd/system.conf.d/rave.conf",
        "tmpfiles.d/rave.conf", "issue.net",
    )  # fmt: skip
    return [debian.text(f"etc/{n}") for n in names], [nix.etc(n) for n in names]


@row
def sessions(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """What is added to systemd's own slice of each user, on NixOS too: not in the place of it."""
    unit = Unit(debian.text("etc/systemd/system/user-.slice.d/rave.conf"))
    row = nix.at("systemd.slices")["user-"]
    assert row["overrideStrategy"] == "asDropin"
    return {k: v[-1] for k, v in unit.items()}, {k: str(v) for k, v in row["sliceConfig"].items()}


@row
def network(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    ini = configparser.RawConfigParser()
    ini.read_string(debian.text("etc/systemd/network/10-uplink.network"))
    row = nix.at("systemd.network.networks")["10-uplink"]
    (address,), (gateway,) = row["address"], row["gateway"]
    assert debian.text("etc/resolv.conf") == nix.etc("resolv.conf")
    settings = {k.lower(): {False: "no"}.get(v, v) for k, v in row["networkConfig"].items()}
    there = {
        "Match": {"driver": row["matchConfig"]["Driver"]},
        "Network": {"address": address, "gateway": gateway, **settings},
    }
    return {name: dict(ini[name]) for name in ini.sections()}, there


@row
def hostname(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    return plan.hostname, debian.text("etc/hostname").strip(), nix.at("networking.hostName")


@row
def mounts(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    lines = [line.split() for line in debian.text("etc/fstab").splitlines() if line[0] != "#"]
    here = {w[1]: (w[2], set(w[3].split(","))) for w in lines}
    # Debian's answer to a damaged disk; NixOS leaves it to the file system's own default
    here["/"][1].discard("errors=remount-ro")
    # sops-nix mounts it: a tmpfs that is not swapped out
    assert nix.at("sops.useTmpfs")
    assert "noswap" in here.pop("/run/secrets.d")[1]
    return here, {
        path: (row["fsType"], set(row["options"])) for path, row in nix.at("fileSystems").items()
    }


@row
def enabled(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Each service of the Plan is on, and starts by itself."""
    on = (
        "services.nginx", "services.openssh", "services.postgresql", "services.prometheus",
        *(f"services.prometheus.exporters.{e}" for e in EXPORTERS), "services.victoriametrics",
        "services.prometheus.alertmanager", "services.prometheus.pushgateway",
        "networking.nftables", "systemd.network",
        *(("services.grafana", "services.grafana.provision") if plan.has("grafana") else ()),
    )  # fmt: skip
    wanted = "etc/systemd/system/multi-user.target.wants"
    here = {debian.tree.file(f"{wanted}/{plan.service(s).unit['debian']}").target for s in OURS}
    there = {tuple(nix.service(s)["wantedBy"]) for s in OURS}
    assert None not in here
    return (
        [dict.fromkeys(on, True), {("multi-user.target",)}],
        [{path: nix.at(path)["enable"] for path in on}, there],
    )


@row
def environments(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    here = {
        s: [debian.unit(s).one("Description"),
            dict(w.split("=") for w in debian.unit(s).one("Environment").split())]
        for s in OURS
    }  # fmt: skip
    there = {s: [nix.service(s)["description"], nix.service(s)["environment"]] for s in OURS}
    return here, there


@row
def timers_and_jails(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """The Plan has none yet: neither may an engine."""
    here = {f.path for f in debian.tree.files if f.path.endswith(".timer") and f.target is None}
    jails = {f.path for f in debian.tree.files if "fail2ban" in f.path}
    there = set(nix.at("systemd").get("timers", {}))
    return set(), here | jails, there | ({"fail2ban"} & set(nix.at("services")))


@row
def units(plan: Plan, debian: Debian, nix: NixOS) -> tuple[Any, ...]:
    """Every unit of the Plan is one that an engine says something of."""
    folder = "etc/systemd/system/"
    here = {
        f.path.removeprefix(folder).removesuffix(".d/rave.conf")
        for f in debian.tree.files
        if f.path.startswith(folder)
    }
    there = {f"{name}.service" for name in nix.at("systemd.services")}
    assert set(plan.units(EngineName.NIX)) <= there
    return set(), set(plan.units(EngineName.DEBIAN)) - here


@pytest.mark.parametrize("profile", PLANS)
@pytest.mark.parametrize("name", ROWS)
def test_both_engines_and_the_plan_agree(profile: str, name: str) -> None:
    first, *others = ROWS[name](*sides(profile))
    for other in others:
        assert other == first


# What only NixOS says: how it boots, what it leaves out, where programs are, how sops-nix works.
OWN = re.compile(
    r"boot\.|documentation\.|environment\.(defaultPackages|systemPackages)|nix\.|time\.|"
    r"fileSystems\..*(device|autoResize)$|networking\.(useDHCP|usePredictable)|"
    r"sops\.(?!secrets|useTmpfs)|system\.|"
    r"systemd\.(coredump|network\.wait-online|services\.(serial-)?getty)|"
    r"systemd\.services\.sops-install-secrets\.|systemd\.tmpfiles\.|"
    r"systemd\.services\.(vibe-kanban|rave-agents-disk|rave-launcher@)\.path\.|"
    r"systemd\.services\.audit-rules-nixos\.after\.|security\.apparmor\.enableCache|"
    r"systemd\.services\.prometheus-nginx-exporter\.(requires|wants)|"
    r"systemd\.services\..*\.(ExecStart|ExecStartPre|ExecReload|RuntimeDirectory\.0|postStart)|"
    r"services\.(resolved|postgresql\.(package|authentication|initdbArgs)|openssh\.openFirewall)|"
    r"services\.nginx\.(virtualHosts\..*\.root|validateConfigFile)$|"
    r"users\.(allowNoPasswordLogin|groups\.www-data|users\..*\.(group|shell|is\w+User)$)"
)


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterable[tuple[Any, ...]]:
    if not isinstance(value, dict | list) or not value:
        yield at
        return
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield from leaves(child, (*at, key))


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return f"{value}x"
    return "other"


@pytest.mark.parametrize("profile", PLANS)
def test_every_setting_is_held_by_a_row_or_is_of_nixos_own(profile: str) -> None:
    plan, debian, nix = sides(profile)
    unheld = []
    for at in leaves(nix.options):
        name = ".".join(map(str, at))
        if OWN.match(name):
            continue
        changed = copy.deepcopy(nix.options)
        inner = changed
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = other(inner[at[-1]])
        if all(agree(function, plan, debian, NixOS(changed, plan)) for function in ROWS.values()):
            unheld.append(name)
    assert unheld == []


def agree(function: Row, plan: Plan, debian: Debian, nix: NixOS) -> bool:
    try:
        first, *others = function(plan, debian, nix)
    except Exception:
        return False
    return all(other == first for other in others)


def test_nixos_alone_has_tempo_and_nothing_else() -> None:
    """What full-pipe says beyond that which Debian can have, too."""
    both = nixos.values(nixos.on_both().hostname)
    full = nixos.values("rave-full-pipe")
    settings = full["services"]["tempo"]["settings"]
    assert settings["distributor"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"] in (
        model.TEMPO_OTLP
    )
    assert settings["usage_report"] == {"reporting_enabled": False}
    more = {at[:3] for at in leaves(full)} - {at[:3] for at in leaves(both)}
    assert more == {
        ("services", "tempo", "enable"), ("services", "tempo", "settings"),
        ("systemd", "services", "tempo"),
    }  # fmt: skip
    sources = full["services"]["grafana"]["provision"]["datasources"]["settings"]["datasources"]
    assert sources[-1]["uid"] == "rave-tempo"
    assert sources[-1]["url"] == f"http://127.0.0.1:{settings['server']['http_listen_port']}"
    folder = nixos.flake() / "modules/rave-full-pipe/files"
    tracing = yaml.safe_load((folder / "dispatcher.yaml").read_text())["tracing"]
    assert tracing == {"otlp_endpoint": model.TEMPO_OTLP}


def test_rotation_calls_what_both_engines_have() -> None:
    plan, debian, nix = sides("safe")
    assert any(s.activation is Activation.ROLE for s in plan.secrets)
    assert any(s.kind is SecretKind.SCRAM for s in plan.secrets)
    rules = [r.split() for r in nix.at("systemd.tmpfiles.rules")]
    linked = {r[1] for r in rules if r[1].startswith("/usr/lib/")}
    assert linked == {"/usr/lib/rave/secrets", "/usr/lib/rave/roles"}
    assert {"usr/lib/rave/secrets", "usr/lib/rave/roles"} <= {f.path for f in debian.tree.files}
