"""The rendered flake in the hands of the real Nix: it parses, evaluates, and sets what exists.

The types of options come from a table of those that the modules set (tests/nix/options.json):
nixpkgs itself cannot be had on every host that runs this.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ravectl import images, profile
from ravectl.engines import nix
from ravectl.plan import make_plan
from ravectl.render import to_nix, write_tree
from tests import nixos

MACHINES = [p.hostname for p in (*nixos.shipped(), nixos.on_both())]
WITH_GRAFANA = ("rave-full-pipe", "rave-on-both")
TABLE = json.loads((nixos.STANDINS / "options.json").read_text())
OPTIONS: dict[str, str] = {name: row["type"] for name, row in TABLE.items()}
CONCERNS = (
    "base", "network", "ssh", "ingress", "kanban", "ccr", "dispatcher", "postgresql",
    "monitoring", "hardening", "secrets", "backup", "logs",
)  # fmt: skip


def sources() -> list[Path]:
    return sorted(nixos.flake().rglob("*.nix"))


def test_every_file_parses() -> None:
    assert len(sources()) > 2 * len(CONCERNS)
    for path in sources():
        done = nixos.instantiate("--parse", str(path))
        assert done.returncode == 0, f"{path.name}: {done.stderr}"


def test_every_file_is_formatted() -> None:
    for path in sources():
        text = path.read_text()
        where = f"{path.parent.name}/{path.name}"
        assert text.endswith("\n"), where
        assert not text.endswith("\n\n"), where
        assert "\n\n\n" not in text, where
        for number, line in enumerate(text.splitlines(), 1):
            assert line == line.rstrip(), f"{where}:{number} ends in blanks"
            assert "\t" not in line, f"{where}:{number} has a tab"
            assert (len(line) - len(line.lstrip())) % 2 == 0, f"{where}:{number} is ill indented"
        # what is asked for in a module's head is used below it
        head = re.match(r"(?:#.*\n)*\{([\w\s,.]*)\}:\n", text)
        for name in re.findall(r"\w+", head[1] if head else ""):
            body = text[head.end() :] if head else ""
            assert re.search(rf"\b{name}\b", body), f"{where} does not use {name}"


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_has_every_concern(machine: str) -> None:
    folder = nixos.flake() / "modules" / machine
    imports = re.findall(r"\./([\w-]+)\.nix", (folder / "default.nix").read_text())
    assert tuple(imports) == CONCERNS
    assert {p.stem for p in folder.glob("*.nix")} == {
        *CONCERNS,
        "default",
        "sandbox",
        "need",
        "check",
    }
    # and nothing is rendered that no module reads
    text = "".join(p.read_text() for p in folder.glob("*.nix"))
    for path in [*folder.glob("files/*"), *folder.glob("scripts/*")]:
        assert f"./{path.parent.name}/{path.name}" in text, path.name


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("concern", CONCERNS)
def test_every_module_evaluates_alone(machine: str, concern: str) -> None:
    alone = nixos.evaluate(nixos.flake() / "modules" / machine / f"{concern}.nix")
    empty = {"sops": {}, "system": {}}
    # no shipped profile names a receiver of logs
    assert (alone == empty) == (concern in ("backup", "logs")), "it sets nothing"


# --- options ------------------------------------------------------------------------------------


def fault(kind: str, value: Any) -> str | None:
    """Why `value` is not of the type that the manual calls `kind`, None when it is."""
    simple = {"boolean": bool, "signed integer": int}
    wrong = f"{value!r} is no {kind}"
    kind = kind.strip()
    if kind.startswith("(") and kind.endswith(")"):
        return fault(kind[1:-1], value)
    for prefix, of in (("list of ", list), ("attribute set of ", dict)):
        if kind.removeprefix("non-empty (").startswith(prefix):
            inner = kind.removeprefix("non-empty (").removeprefix(prefix)
            if not isinstance(value, of):
                return wrong
            each = value if isinstance(value, list) else value.values()
            return next(filter(None, (fault(inner, v) for v in each)), None)
    if kind == "YAML value":
        json.dumps(value)  # what YAML can say, JSON can, of what Nix hands out
        return None
    if kind.startswith("null or "):
        return None if value is None else fault(kind.removeprefix("null or "), value)
    if kind.startswith("one of "):
        words = kind.removeprefix("one of ").replace("“", '"').replace("”", '"')
        known = json.loads(f"[{words}]")  # strings, numbers, true and false
        return None if [type(value), value] in [[type(k), k] for k in known] else wrong
    if kind in ("submodule", "attribute set") or kind.startswith("submodule"):
        return None if isinstance(value, dict) else wrong
    if kind.startswith(
        ("systemd option", "sysctl option", "atom", "boolean or", "attribute set of (boolean")
    ):
        return None if isinstance(value, bool | int | float | str | list | dict) else wrong
    if kind in simple:
        return None if type(value) is simple[kind] else wrong
    if "integer" in kind and "string" not in kind:
        return None if type(value) is int and 0 <= value <= 65535 else wrong
    if kind.startswith(("path", "package")):
        return None if isinstance(value, str) and value.startswith("/") else wrong
    if kind.startswith("string matching the pattern"):
        return None if isinstance(value, str) and " " not in value else wrong
    if "string" in kind:
        return None if isinstance(value, str | int | dict) else wrong
    raise AssertionError(f"this test does not know the type {kind!r}")


def faults(value: Any, at: str = "") -> list[str]:
    """What of a machine's settings is no option, or not of its option's type."""
    found = []
    if at in OPTIONS and (why := fault(OPTIONS[at], value)):
        found.append(f"{at}: {why}")
    below = [n for n in OPTIONS if n.startswith(f"{at}." if at else "")]
    if at in OPTIONS and not below:
        return found
    if isinstance(value, list):
        for item in value:
            found += faults(item, f"{at}.*")
        return found
    if not isinstance(value, dict):
        return found
    for key, child in value.items():
        names = [f"{at}.{k}".lstrip(".") for k in (key, "<name>")]
        name = next((n for n in names if any(o == n or o.startswith(f"{n}.") for o in below)), None)
        free = at in OPTIONS and "attribute set of (submodule)" not in OPTIONS[at]
        if name is not None:
            found += faults(child, name)
        elif not (free and "attribute set" in OPTIONS[at]) and not _is_free_row(at):
            found.append(f"{at}.{key} is no option of NixOS that the table has")
    return found


def _is_free_row(at: str) -> bool:
    """Whether this is a row of a list whose rows may have keys beside the declared ones."""
    return OPTIONS.get(at.removesuffix(".*")) == "list of (YAML value)"


@pytest.mark.parametrize("machine", MACHINES)
def test_every_option_exists_and_holds_its_type(machine: str) -> None:
    assert faults(nixos.values(machine)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"services": {"nginx": {"enabled": True}}}, "services.nginx.enabled is no option"),
        ({"services": {"nginx": {"enable": "yes"}}}, "services.nginx.enable: 'yes' is no boolean"),
        ({"services": {"openssh": {"ports": 22}}}, "services.openssh.ports: 22 is no list"),
        ({"services": {"openssh": {"settings": {"LogLevel": "LOUD"}}}}, "'LOUD' is no"),
        ({"users": {"users": {"x": {"uuid": 3}}}}, "users.users.<name>.uuid is no option"),
        ({"services": {"nope": {}}}, "services.nope is no option"),
        (
            {"services": {"nginx": {"virtualHosts": {"x": {"listen": [{"port": 70000}]}}}}},
            "70000 is no",
        ),
    ],
)
def test_a_wrong_option_is_found(change: dict[str, Any], expected: str) -> None:
    assert any(expected in f for f in faults(change)), faults(change)


def test_no_row_of_the_table_is_unused() -> None:
    used: set[str] = set()

    def walk(value: Any, at: str) -> None:
        used.add(at)
        if isinstance(value, list):
            for item in value:
                walk(item, f"{at}.*")
        elif isinstance(value, dict):
            for key, child in value.items():
                for name in (key, "<name>"):
                    walk(child, f"{at}.{name}".lstrip("."))

    for machine in MACHINES:
        walk(nixos.values(machine), "")
    assert set(OPTIONS) - used == set()


def test_two_modules_that_contradict_each_other_are_found(tmp_path: Path) -> None:
    said = fails(tmp_path, 'networking.hostName = "other";')
    assert "conflicting definitions of networking.hostName" in said


def fails(tmp_path: Path, module: str) -> str:
    """What Nix says of a machine that has one more module."""
    machine = nixos.flake() / "modules" / MACHINES[0]
    (tmp_path / "more.nix").write_text(f"{{ imports = [ {machine} ]; {module} }}")
    done = nixos.instantiate(
        "--eval", "--strict", "--json", str(nixos.STANDINS / "evaluate.nix"), "--arg", "machine",
        str(tmp_path / "more.nix"),
    )  # fmt: skip
    assert done.returncode != 0
    return done.stderr


# --- what NixOS itself says ---------------------------------------------------------------------


def test_no_file_lies_below_a_link_of_nixos(tmp_path: Path) -> None:
    """The etc of NixOS would not be built."""
    name = "systemd/system/user-.slice.d/more.conf"
    said = fails(tmp_path, f'environment.etc."{name}".text = "";')
    assert f'"{name}" lies below a link' in said


def test_what_nixos_says_of_its_units_is_not_contradicted(tmp_path: Path) -> None:
    """Where ours say something else, they say it with more force."""
    said = fails(tmp_path, 'services.tempo.enable = true; systemd.services.tempo.serviceConfig = '
                 '{ ProtectSystem = "strict"; };')  # fmt: skip
    assert "conflicting definitions of systemd.services.tempo.serviceConfig.ProtectSystem" in said
    for machine in MACHINES:
        units = nixos.values(machine)["systemd"]["services"]
        assert units["prometheus-nginx-exporter"]["requires"] == []
    tempo = nixos.values("rave-full-pipe")["systemd"]["services"]["tempo"]["serviceConfig"]
    ours = nixos.values("rave-full-pipe")["systemd"]["services"]["mtail"]["serviceConfig"]
    assert tempo["ProtectSystem"] == "strict"
    assert not {k for k in ours if k.startswith(("Protect", "Restrict", "Private"))} - set(tempo)


@pytest.mark.parametrize("url", ["https://logs.example.org:443", "http://10.0.2.2:19532"])
def test_a_machine_that_sends_its_journal(tmp_path: Path, url: str) -> None:
    """No shipped profile does."""
    text = f"extends: safe\nname: sends\nlogs: {{forward: {{url: '{url}'}}}}\n"
    (tmp_path / "rave.yaml").write_text(text)
    plan = make_plan(**profile.select(None, {}, tmp_path / "rave.yaml").plan_arguments())
    write_tree(images.render_nixos((plan,)), tmp_path / "flake")
    values = nixos.evaluate(tmp_path / "flake" / "modules" / "rave-sends")
    unit = values["systemd"]["services"]["systemd-journal-upload"]
    assert unit["serviceConfig"]["RestartSec"] == "1s"
    assert values["services"]["journald"]["upload"]["settings"]["Upload"]["URL"]


@pytest.mark.parametrize("machine", MACHINES)
def test_what_would_not_do_on_nixos(machine: str) -> None:
    values = nixos.values(machine)
    units = values["systemd"]["services"]
    # gixy refuses it, by which NixOS holds nginx's configuration otherwise
    assert "$http_host" in json.dumps(values["services"]["nginx"])
    assert values["services"]["nginx"]["validateConfigFile"] is False
    # the paths of these rules are made by these units
    rules = " ".join(values["security"]["audit"]["rules"])
    made = {
        "/run/secrets.d": "sops-install-secrets.service",
        "/run/wrappers/bin/": "suid-sgid-wrappers.service",
    }
    assert all(path in rules for path in made)
    assert units["audit-rules-nixos"]["after"] == list(made.values())
    # where tasks find their programs
    assert units["rave-launcher@"]["path"] == ["/run/current-system/sw"]


# --- what the daemons say -----------------------------------------------------------------------


def nginx_conf(options: dict[str, Any]) -> str:
    """nginx.conf in the order in which NixOS' module writes it (in the place of that module)."""
    text = f"error_log {options['logError']}; events {{ {options['eventsConfig']} }}\n"
    text += options["appendConfig"] + "http {\n"
    text += "include /etc/nginx/mime.types; default_type application/octet-stream;\n"
    for name, row in options["upstreams"].items():
        servers = "".join(f"server {s};" for s in row["servers"])
        text += f"upstream {name} {{ {servers} {row['extraConfig']} }}\n"
    text += f"ssl_protocols {options['sslProtocols']};\n"
    text += f"map_hash_bucket_size {options['mapHashBucketSize']};\n"
    text += "map $http_upgrade $connection_upgrade { default upgrade; '' close; }\n"
    text += f"client_max_body_size {options['clientMaxBodySize']};\n"
    text += f"server_tokens {'on' if options['serverTokens'] else 'off'};\n"
    text += options["commonHttpConfig"]
    for name, host in options["virtualHosts"].items():
        text += "server {\n"
        for row in host["listen"]:
            flags = ["ssl"] * row.get("ssl", False) + ["default_server"] * host.get(
                "default", False
            )
            text += f"listen {row['addr']}:{row['port']} {' '.join(flags)};\n"
        text += f"server_name {name};\n"
        if "root" in host:
            text += f"root {host['root']};\n"
        if "sslCertificate" in host:
            text += f"ssl_certificate {host['sslCertificate']};\n"
            text += f"ssl_certificate_key {host['sslCertificateKey']};\n"
        for path, row in host["locations"].items():
            text += f"location {path} {{\n{row.get('extraConfig', '')}\n"
            for key, word in (("proxyPass", "proxy_pass"), ("tryFiles", "try_files")):
                text += f"{word} {row[key]};\n" if key in row else ""
            text += f"return {row['return']};\n}}\n" if "return" in row else "}\n"
        text += host.get("extraConfig", "") + "}\n"
    return text + "}\n"


@pytest.mark.parametrize("machine", MACHINES)
def test_nginx_accepts_its_configuration(machine: str, tmp_path: Path) -> None:
    for name in ("secrets/ingress", "rave-ingress"):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=test",
         "-keyout", tmp_path / "rave-ingress/tls-key",
         "-out", tmp_path / "secrets/ingress/tls-cert"],
        check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "secrets/ingress/htpasswd").write_text("rave:{PLAIN}test\n")
    key = "k" * 51  # the longest that has room
    (tmp_path / "rave-ingress/router-key.conf").write_text(
        'map "$http_x_api_key|$http_authorization" $rave_router_realm {\n'
        f'  default "RAVE"; "{key}|Bearer {key}" off;\n}}\n'
        'map $host $rave_router_key { default "key"; }\n'
        "map $http_x_rave_trial $rave_stranger { default $binary_remote_addr; }\n"
    )
    text = nginx_conf(nixos.values(machine)["services"]["nginx"])
    text = text.replace("/run/secrets/", f"{tmp_path}/secrets/")
    text = text.replace("/run/rave-ingress/", f"{tmp_path}/rave-ingress/")
    conf = tmp_path / "nginx.conf"

    def check(text: str) -> str:
        conf.write_text(f"pid {tmp_path}/nginx.pid;\n{text}")
        done = subprocess.run(
            ["nginx", "-t", "-c", conf, "-p", tmp_path], capture_output=True, text=True, check=False
        )
        return "" if done.returncode == 0 else done.stderr

    assert check(text) == ""
    assert "unknown directive" in check(text.replace("sendfile on", "sendfiles on"))


@pytest.mark.parametrize("machine", MACHINES)
def test_nft_accepts_the_ruleset(machine: str) -> None:
    (name, table), *rest = nixos.values(machine)["networking"]["nftables"]["tables"].items()
    assert not rest
    ruleset = f"table {table['family']} {name} {{\n{table['content']}\n}}\n"
    done = subprocess.run(
        ["unshare", "--net", "nft", "--check", "--file", "-"], input=ruleset, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("machine", MACHINES)
def test_scripts_are_those_of_nixos(machine: str) -> None:
    scripts = {p.stem: p for p in (nixos.flake() / "modules" / machine / "scripts").glob("*.sh")}
    own = {"grafana-password"} if machine in WITH_GRAFANA else set()
    assert set(scripts) == own | {
        "agents-disk", "bans", "clock", "ingress-config", "need", "roles", "router-config",
        "secrets", "units",
    }  # fmt: skip
    for path in scripts.values():
        done = subprocess.run(["bash", "-n", path], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        # there is no /usr but for env, and what ravectl calls
        assert not re.findall(r"/usr/(?!lib/rave)\S+", path.read_text()), path.name
    assert "sops-install-secrets" in scripts["secrets"].read_text()
    assert "rave-ingress/tls-key" in scripts["ingress-config"].read_text()


# --- the flake ----------------------------------------------------------------------------------


def run_nix(tmp_path: Path, *words: str) -> str:
    done = subprocess.run(
        ["nix", *words, *nixos.OVERRIDES], env=nixos.environment(tmp_path), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_flake_has_what_it_promises(tmp_path: Path) -> None:
    seen = json.loads(run_nix(tmp_path, "flake", "show", "--json", f"path:{nixos.flake()}"))
    assert set(seen["nixosConfigurations"]) == set(MACHINES)
    assert set(seen["nixosModules"]) == set(MACHINES)
    assert set(seen["checks"]["x86_64-linux"]) == set(MACHINES)
    formats = ["", *(f"-{f}" for f in nix.FORMATS)]
    expected = {f"{m}{f}" for m in MACHINES for f in formats}
    assert set(seen["packages"]["x86_64-linux"]) == expected
    assert "default" in seen["devShells"]["x86_64-linux"]


def test_nix_accepts_the_flake(tmp_path: Path) -> None:
    run_nix(tmp_path, "flake", "check", f"path:{nixos.flake()}")


def test_the_lock_is_of_the_flake() -> None:
    text = (nixos.flake() / nix.LOCK_FILE).read_text()
    pins = {p.name: p for p in nix.pins(text, Path(nix.LOCK_FILE))}
    assert set(pins) == {"nixpkgs", "sops-nix"}
    for pin in pins.values():
        assert re.fullmatch("[0-9a-f]{40}", pin.revision)
        assert re.fullmatch("sha256-[A-Za-z0-9+/]{43}=", pin.nar_hash)
    nodes = json.loads(text)["nodes"]
    source = (nixos.flake() / "flake.nix").read_text()
    for name in pins:
        o = nodes[name]["original"]
        url = "/".join(filter(None, (o["owner"], o["repo"], o.get("ref"))))
        assert f'{name}.url = "github:{url}"' in source
    assert nodes["sops-nix"]["inputs"]["nixpkgs"] == ["nixpkgs"]


def test_nix_finds_the_lock_complete(tmp_path: Path) -> None:
    # it would have to ask the network otherwise, or is forbidden to write
    done = subprocess.run(
        ["nix", "flake", "metadata", "--json", "--no-update-lock-file", f"path:{nixos.flake()}"],
        env=nixos.environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    nodes = json.loads(done.stdout)["locks"]["nodes"]
    assert set(nodes) == {"root", "nixpkgs", "sops-nix"}


DRIVER_STUBS = """
from contextlib import AbstractContextManager
class Machine:
    def wait_for_unit(self, unit: str) -> None: ...
    def wait_until_succeeds(self, command: str) -> str: return ""
    def succeed(self, command: str) -> str: return ""
    def fail(self, command: str) -> str: return ""
machine = Machine()
def subtest(name: str) -> AbstractContextManager[None]: raise NotImplementedError
"""


@pytest.mark.parametrize("machine", MACHINES)
def test_the_vm_test_is_python(machine: str, tmp_path: Path) -> None:
    """It cannot run here: that it would not fail by a slip is all that is shown."""
    check = nixos.flake() / "modules" / machine / "check.nix"
    standins = nixos.STANDINS / "nixpkgs"
    done = nixos.instantiate(
        "--eval", "--strict", "--json", "--expr",
        f"((import {check} {{ module = {{ }}; }}) {{ lib = import {standins}/lib.nix; "
        f"pkgs = import {standins}/pkgs.nix; }}).testScript",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = ast.parse(json.loads(done.stdout))
    names = [n for n in ast.walk(script) if isinstance(n, ast.Name)]
    made = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    assert {n.id for n in names} - made == {"machine", "subtest", "shlex", "int", "set"}
    subtests = [n for n in ast.walk(script) if isinstance(n, ast.With)]
    assert len(subtests) == 8
    # NixOS' driver does not start a script that mypy objects to
    file = tmp_path / "script.py"
    file.write_text(f"{DRIVER_STUBS}\n{json.loads(done.stdout)}")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "--config-file=", file],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout


def test_a_workspace_may_have_another_profile(tmp_path: Path) -> None:
    (tmp_path / "rave.yaml").write_text("extends: safe\nname: mine\nmachine: {memory: 3 GB}\n")
    plan = make_plan(**profile.select(None, {}, tmp_path / "rave.yaml").plan_arguments())
    write_tree(images.render_nixos((plan,)), tmp_path / "flake")
    values = nixos.evaluate(tmp_path / "flake" / "modules" / "rave-mine")
    assert values["networking"]["hostName"] == "rave-mine"


def test_the_example_imports_our_modules(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "nixos-module"
    attributes = [".config.networking.hostName", ".config.services.prometheus.retentionTime"]
    attributes.append(".config.systemd.services.prometheus.serviceConfig.MemoryMax")
    seen = []
    for attribute in attributes:
        done = subprocess.run(
            ["nix", "eval", "--json",
             f"path:{example}#nixosConfigurations.workbench{attribute}",
             "--override-input", "rave", f"path:{nixos.flake()}",
             "--override-input", "rave/nixpkgs", f"path:{nixos.STANDINS / 'nixpkgs'}",
             "--override-input", "rave/sops-nix", f"path:{nixos.STANDINS / 'sops-nix'}",
             "--no-write-lock-file"],
            env=nixos.environment(tmp_path), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen.append(json.loads(done.stdout))
    assert seen == ["workbench", "30d", "1G"]


# --- values as Nix ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [True, None, 3, -3, "plain", 'quo"te', "back\\slash", "${not} $a", "line\nline", ["a", -1], {}],
)
def test_a_value_in_nix_is_itself(value: Any) -> None:
    done = nixos.instantiate("--eval", "--strict", "--json", "--expr", to_nix(value))
    assert json.loads(done.stdout) == value, done.stderr
