"""`ravectl build --engine nix` with the real Nix of this host, on good days and bad ones.

What takes the places of nixpkgs and sops-nix is in tests/nix: Nix evaluates and builds the flake
that ravectl renders, in a store of the test's own. The program `nix` that ravectl finds says that
it is new enough and hands everything to the real one, which on Debian 12 is older than the real
nixpkgs needs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ravectl import building, files, images, profile
from ravectl.engines import debian, nix
from ravectl.model import ImageFormat, NixSettings
from ravectl.plan import make_plan
from ravectl.workspace import Workspace
from tests import nixos
from tests.conftest import Tool

REAL_NIX = shutil.which("nix")
REAL_STORE = shutil.which("nix-store")
STAND_IN = """\
#!/bin/sh
# in the place of nix {version}: the real one of this host, with the inputs of the test
case "$1" in --version) echo "nix (Nix) {version}"; exit;; esac
for word; do
  shift
  # naming other inputs is a change of the lock
  [ "$word" = --no-update-lock-file ] || set -- "$@" "$word"
done
case " $* " in *" build "*) set -- "$@" {overrides};; esac
exec {nix} "$@"
"""
# as on a host to which npm brought before what nixpkgs does not have
STORE_THAT_HOLDS_ALL = f"""\
#!/bin/sh
case "$1" in --check-validity) exit 0;; esac
exec {REAL_STORE} "$@"
"""
NPM = """\
#!/bin/sh
# npm pack --json --ignore-scripts --pack-destination FOLDER NAME@VERSION
cp {tarball} "$5/" && echo '[{{"filename": "{name}"}}]'
"""
DEAD = "http://127.0.0.1:9"  # nothing listens there


# what stdenv makes of a source, by the phases that the flake says something of
UNPACKED = """\
runCommand attrs.pname { } ''
  unzip() { python3 -m zipfile -e "$1" .; }
  tar -xzf ${attrs.src}
  cd ${attrs.sourceRoot}
  ${attrs.installPhase}
'' // { inherit (attrs) meta; }"""


class NixTool(Tool):
    """ravectl with a Nix of its own."""

    folder: Path
    nixpkgs: Path

    def set_up(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "ravectl"
        self.nixpkgs = folder / "nixpkgs"
        shutil.copytree(nixos.STANDINS / "nixpkgs", self.nixpkgs)
        self.stand_in("2.18.0")
        self.program("nix-store", STORE_THAT_HOLDS_ALL)

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def npm_serves(self, tarball: Path) -> None:
        """What nixpkgs does not have is not in the store, and npm serves this one for it."""
        (self.folder / "bin" / "nix-store").unlink()
        self.program("npm", NPM.format(tarball=tarball, name=tarball.name))
        self.change("pkgs.nix", "(package attrs.pname)", f"({UNPACKED})")

    def stand_in(self, version: str) -> None:
        overrides = (
            f"--override-input nixpkgs path:{self.nixpkgs} "
            f"--override-input sops-nix path:{nixos.STANDINS / 'sops-nix'}"
        )
        self.program("nix", STAND_IN.format(version=version, overrides=overrides, nix=REAL_NIX))

    def configure(self, text: str) -> None:
        nixos.environment(self.folder / "nix", nixos.CONFIGURATION + text)

    def change(self, file: str, old: str, new: str) -> None:
        """Change the stand-in of nixpkgs."""
        path = self.nixpkgs / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    @property
    def environment(self) -> dict[str, str]:
        conf = self.folder / "nix" / "conf" / "nix.conf"
        known = conf.read_text() if conf.exists() else nixos.CONFIGURATION
        return {
            **nixos.environment(self.folder / "nix", known),
            **super().environment,
            "RAVECTL_ENGINE": "auto",
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "TMPDIR": str(self.folder),  # where Nix builds
        }

    def nix(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=True
        )

    def build(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self("build", "--engine", "nix", *words, code=code)

    def processes(self) -> dict[int, str]:
        """What works in the test's folder, by process."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    inside = str((entry / "cwd").readlink())
                except OSError:
                    continue
                if str(self.folder) in words or str(self.folder) in inside:
                    found[int(entry.name)] = words.strip()
        return found

    def leftovers(self) -> list[str]:
        """What of a build is still there: processes and images."""
        assert self.cache is not None
        return [*self.processes().values(), *map(str, self.cache.glob("images/*/disk.*"))]


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[NixTool]:
    for name in ("workspace", "host"):
        (tmp_path / name).mkdir()
    made = NixTool(tmp_path / "workspace")
    made.set_up(tmp_path / "host")
    yield made
    made.end()


KERNEL = '"mkdir $out; echo kernel >$out/bzImage"'


# --- good days ----------------------------------------------------------------------------------


def test_an_image(tool: NixTool) -> None:
    done = tool.build("--safe")
    disk = Path(done.stdout.strip())
    assert re.search(r"^done  nix build rave-safe  \(", done.stderr, re.M)
    assert re.search(r"^image [0-9a-f]{16} is made$", done.stderr, re.M)
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", disk], capture_output=True, check=True
        ).stdout
    )
    assert (info["format"], info["virtual-size"]) == ("qcow2", 10 * 2**30)
    # `up` finds all that it gives QEMU
    manifest = json.loads((disk.parent / "image.json").read_text())
    assert manifest["engine"] == "nix"
    assert (disk.parent / "vmlinuz").read_text() == "kernel\n"
    assert (disk.parent / "initrd").read_text() == "initrd\n"
    (system,) = manifest["closure"]
    assert manifest["cmdline"] == f"init={system}/init console=ttyS0 quiet panic=-1"
    loaded = images.load(disk.parent)
    assert loaded.hashes["disk.qcow2"] == files.digest_file(disk)
    assert os.access(disk, os.W_OK)
    # what NixOS was told is in it
    configuration = json.loads((Path(system) / "configuration.json").read_text())
    assert configuration["networking"]["hostName"] == "rave-safe"
    # the second time there is nothing to do
    again = tool.build("--safe")
    assert "was there already" in again.stderr
    assert "nix build" not in again.stderr


def test_formats(tool: NixTool, tmp_path: Path) -> None:
    (tool.workspace / "rave.yaml").write_text("extends: safe\nmachine: {disk: 4 GB}\n")
    raw = Path(tool.build("--format", "raw").stdout.strip())
    assert raw.stat().st_size == 4 * 2**30
    assert raw.stat().st_blocks * 512 < 2**24, "it keeps its holes"
    for fmt, grub in nix.FORMATS.items():
        out = tmp_path / f"out.{fmt}"
        tool.build("--format", fmt, "-o", str(out))
        assert out.read_text() == f"{fmt} grub={str(grub).lower()}\n"


def test_a_compressed_image(tool: NixTool, tmp_path: Path) -> None:
    disk = Path(tool.build("--compress").stdout.strip())
    done = subprocess.run(["qemu-img", "info", disk], capture_output=True, text=True, check=True)
    assert "compression type: zstd" in done.stdout


def test_the_same_bits_twice(tool: NixTool) -> None:
    done = tool.build("--check")
    assert "nix build --rebuild rave-safe" in done.stderr
    assert "the same bits" in done.stderr


@pytest.mark.parametrize(
    ("noisy", "form"), [("ext4-fs.img", "qcow2"), ("image-iso", "iso")], ids=["disk", "format"]
)
def test_other_bits(tool: NixTool, noisy: str, form: str) -> None:
    """Not in what only converts or names the disk, but in the disk."""
    quiet = tool.build("--check", "--format", form)
    assert "built twice: the same bits" in quiet.stderr
    more = "if [ -d $out ]; then date +%N >$out/noise; else date +%N >>$out; fi"
    tool.change(
        "pkgs.nix",
        "          script\n",
        f'          (script + (if name == "{noisy}" then "\\n{more}" else ""))\n',
    )
    done = tool.build("--check", "--format", form, code=1)
    assert "two builds of the same inputs differ" in done.stderr


def test_choosing_an_engine_makes_nothing(tool: NixTool, tmp_path: Path) -> None:
    typo = tmp_path / "typo"
    (tool.workspace / "rave.yaml").write_text(
        f"extends: safe\nnix: {{substituters: ['file://{typo}']}}\n"
    )
    done = tool("build", "--format", "iso", code=4)
    assert "only the nix engine makes iso, and no substituter answers" in done.stderr
    assert "debian" not in done.stderr.partition("fix:")[2]
    assert not typo.exists()


def test_gc_while_nix_builds(tool: NixTool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Nix made is let go before it is copied: then it is asked for once more."""
    monkeypatch.setenv("RAVECTL_CACHE_DIR", str(tool.folder / "ravectl"))
    for name, value in tool.environment.items():
        monkeypatch.setenv(name, value)
    plan = make_plan(**profile.load("safe", None).plan_arguments())
    inputs = images.resolve_nixos(plan, ImageFormat.QCOW2, NixSettings(), offline=True)
    build, calls = images.build_nixos, []

    def build_and_collect(inputs: images.NixInputs) -> nix.Built:
        made = build(inputs)
        calls.append(inputs)
        if len(calls) == 1:
            building.collect(dry_run=False)
        return made

    monkeypatch.setattr(images, "build_nixos", build_and_collect)
    image, made = images.ensure_image(inputs, Workspace(tool.workspace))
    assert made
    assert image.disk.stat().st_size > 0
    assert len(calls) == 2


def a_part(folder: Path) -> tuple[debian.NpmPart, Path]:
    """Vibe Kanban as npm packs it, of another version."""
    program = folder / "vibe-kanban.zip"
    with zipfile.ZipFile(program, "w") as z:
        z.writestr("vibe-kanban", "#!/bin/sh\necho it runs\n")
    tarball = folder / "vibe-kanban-9.9.9.tgz"
    with tarfile.open(tarball, "w:gz") as tar:
        tar.add(program, "package/dist/linux-x64/vibe-kanban.zip")
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    return debian.NpmPart("vibe-kanban", "9.9.9", f"sha512-{digest}"), tarball


def test_what_nixpkgs_does_not_have_is_brought(
    tool: NixTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, tarball = a_part(tool.folder)
    assert part.tarball == tarball.name
    tool.npm_serves(tarball)
    monkeypatch.setattr(debian, "KANBAN", part)
    monkeypatch.setenv("RAVECTL_CACHE_DIR", str(tool.folder / "ravectl"))
    for name, value in tool.environment.items():
        monkeypatch.setenv(name, value)
    plan = make_plan(**profile.load("safe", None).plan_arguments())
    inputs = images.resolve_nixos(plan, ImageFormat.QCOW2, NixSettings())
    built = images.build_nixos(inputs)
    configuration = json.loads((Path(built.closure[0]) / "configuration.json").read_text())
    units = configuration["systemd"]["services"]
    started = units["vibe-kanban"]["serviceConfig"]["ExecStart"]
    assert tool.nix(started).stdout == "it runs\n"
    # it is there now, and nobody is asked again
    tool.program("npm", "#!/bin/sh\nexit 1\n")
    images.build_nixos(inputs)


def test_what_was_not_pinned_is_not_taken(tool: NixTool) -> None:
    _, tarball = a_part(tool.folder)
    pinned = debian.KANBAN.tarball
    tool.npm_serves(tarball.rename(tool.folder / pinned))
    done = tool.build(code=1)
    assert "from npm is not what was pinned" in done.stderr
    assert not list((tool.folder / "nix" / "store").glob(f"*{pinned}"))
    # nor is it missed by a name alone
    done = tool.build("--offline", code=1)
    assert f"error: {pinned} is not in Nix's store, and Nix cannot fetch it" in done.stderr
    assert "fix: build once without --offline" in done.stderr
    assert tool.leftovers() == []


@pytest.mark.parametrize(
    "words", [("--locked",), ("--update", "--offline"), ("--check", "-o", "x")]
)
def test_options_that_do_not_go_together(tool: NixTool, words: tuple[str, ...]) -> None:
    done = tool.build(*words, code=2)
    assert "error: " in done.stderr
    assert "fix: " in done.stderr


def test_the_engine_is_chosen(tool: NixTool, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "nix-cache-info").write_text(f"StoreDir: {tool.folder / 'nix' / 'store'}\n")
    tool.configure(f"extra-substituters = file://{cache}\nrequire-sigs = false\n")
    done = tool("build", "--safe")
    assert "engine nix: its substituters answer" in done.stderr
    assert "nix build rave-safe" in done.stderr


def test_a_cache_that_the_profile_names(tool: NixTool, tmp_path: Path) -> None:
    tool.build("--safe")
    cache = f"file://{tmp_path}/cache"
    roots = tool.folder / "ravectl" / "nix" / "roots"
    tool.nix("nix", "copy", "--to", cache, str(next(roots.iterdir()).resolve()))
    shutil.rmtree(tool.folder / "ravectl")
    tool.nix("nix-store", "--gc")
    (tool.workspace / "rave.yaml").write_text(
        f"extends: safe\nnix: {{substituters: ['{cache}']}}\n"
    )
    tool.configure("require-sigs = false\n")
    done = tool.build()
    assert "is made" in done.stderr
    logs = tool.folder / "nix" / "log"
    before = {p.stat().st_mtime_ns for p in logs.rglob("*rave-safe.drv*")}
    assert len(before) == 1, "it was not built again"


def test_a_lock_and_a_flake(tool: NixTool, tmp_path: Path) -> None:
    said = tool("lock").stdout
    assert re.search(r"^nixpkgs +[0-9a-f]{40}  sha256-", said, re.M)
    lock = tool.workspace / "flake.lock"
    assert json.loads(lock.read_text())["version"] == 7
    tool("render", "--engine", "nix", str(tmp_path / "flake"))
    assert (tmp_path / "flake" / "flake.lock").read_text() == lock.read_text()
    modules = sorted(p.name for p in (tmp_path / "flake" / "modules").iterdir())
    assert modules == ["rave-full-pipe", "rave-safe"]
    lock.write_text("{")
    assert "flake.lock is damaged" in tool.build(code=1).stderr


def test_todays_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs that this host has: the real `nix flake update` writes the lock."""
    shutil.copytree(nixos.STANDINS / "nixpkgs", tmp_path / "nixpkgs")
    flake = tmp_path / "flake"
    flake.mkdir()
    (flake / "flake.nix").write_text(
        f'{{ inputs.nixpkgs.url = "path:{tmp_path}/nixpkgs"; outputs = _: {{ }}; }}'
    )
    for name, value in nixos.environment(tmp_path / "nix").items():
        monkeypatch.setenv(name, value)
    seen = []
    for content in ("one", "two"):
        (tmp_path / "nixpkgs" / "content").write_text(content)
        text = nix.updated_lock(flake, oldest=(2, 4))
        seen.append(json.loads(text)["nodes"]["nixpkgs"]["locked"]["narHash"])
    assert len(set(seen)) == 2


# --- bad days -----------------------------------------------------------------------------------


def test_a_derivation_fails(tool: NixTool) -> None:
    script = '"for n in 1 2 3; do echo step $n; done; echo no room >&2; exit 3"'
    tool.change("nixos.nix", KERNEL, script)
    done = tool.build(code=1)
    assert "error: building linux failed" in done.stderr
    assert "| step 3" in done.stderr
    assert "| no room" in done.stderr
    assert re.search(r"\| builder for '\S+-linux\.drv' failed with exit code 3", done.stderr)
    assert "fix: see the whole log: nix log" in done.stderr
    assert tool.leftovers() == []


def test_the_flake_does_not_evaluate(tool: NixTool) -> None:
    tool.change("nixos.nix", KERNEL, '(throw "no kernel today")')
    done = tool.build(code=1)
    assert "nix build failed: no kernel today" in done.stderr
    assert "ravectl render --engine nix" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ravectl_dies_during_a_build(tool: NixTool, number: signal.Signals) -> None:
    tool.change("nixos.nix", KERNEL, '"echo started; sleep 300"')
    running = tool.start("build", "--engine", "nix")
    wait_until("the build", lambda: "sleep 300" in tool.processes().values())
    running.send_signal(number)
    running.communicate(timeout=120)
    assert running.returncode == (130 if number is signal.SIGINT else -signal.SIGKILL)
    if number is signal.SIGKILL:
        # Nix dies with us at once, so without a sandbox or a daemon nobody ends what it started
        wait_until("the end of nix", lambda: not any("nix" in w for w in tool.processes().values()))
        for pid in tool.processes():
            os.kill(pid, signal.SIGKILL)
    wait_until("the end of everything", lambda: not tool.leftovers())
    # and the next one is none the worse
    tool.change("nixos.nix", '"echo started; sleep 300"', KERNEL)
    assert "is made" in tool.build().stderr


def wait_until(what: str, happened: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.1)


def test_nix_is_missing(tool: NixTool, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for path in Path("/usr/bin").iterdir():
        if not path.name.startswith("nix"):
            (tools / path.name).symlink_to(path)
    for words in (["--engine", "nix"], ["--format", "iso"]):
        done = tool("build", *words, code=4, env={"PATH": str(tools)})
        assert "nix is not installed on this host" in done.stderr
        assert "fix: install Nix" in done.stderr


def test_nix_is_too_old(tool: NixTool) -> None:
    tool.stand_in("2.8.1")
    done = tool.build(code=4)
    assert "nix 2.8.1 is too old: the flake needs 2.18 or later" in done.stderr
    assert "--engine debian" in done.stderr


def test_no_substituter_answers(tool: NixTool) -> None:
    tool.configure(f"extra-substituters = {DEAD}\n")
    done = tool("build", "--format", "iso", code=4)
    assert "only the nix engine makes iso, and no substituter answers (127.0.0.1)" in done.stderr


def test_something_cannot_be_downloaded(tool: NixTool) -> None:
    fetch = f"""(derivation {{
      name = "linux"; system = "builtin"; builder = "builtin:fetchurl"; url = "{DEAD}/linux";
      outputHash = "{"0" * 64}"; outputHashAlgo = "sha256"; outputHashMode = "flat";
    }})"""
    tool.change("nixos.nix", f'pkgs.runCommand "linux" {{ }} {KERNEL}', fetch)
    tool.configure("download-attempts = 1\n")
    done = tool.build(code=1)
    assert re.search("building linux failed|could not download", done.stderr)
    assert f"{DEAD}/linux" in done.stderr
    assert tool.leftovers() == []


def test_no_revisions_can_be_had(tool: NixTool) -> None:
    tool("lock")
    lock = tool.workspace / "flake.lock"
    before = lock.read_text()
    tool.configure("download-attempts = 1\n")
    done = tool("lock", "--update", code=1, env={"https_proxy": DEAD, "HTTPS_PROXY": DEAD})
    assert "nix failed" in done.stderr
    assert "check that this host reaches the flake's inputs" in done.stderr
    assert lock.read_text() == before


def test_without_a_network_what_is_there_must_do(tool: NixTool) -> None:
    tool.configure(f"extra-substituters = {DEAD}\n")
    done = tool("build", "--offline")
    assert "engine nix: nix is there" in done.stderr
    assert "is made" in done.stderr


def test_what_nix_collected_is_made_again(tool: NixTool) -> None:
    disk = Path(tool.build("--safe").stdout.strip())
    bits = files.digest_file(disk)
    link = tool.folder / "ravectl" / "nix" / "roots" / disk.parent.name
    kept = link.resolve()
    tool.nix("nix-store", "--gc")
    assert kept.exists(), "the root keeps it"
    link.unlink()
    tool.nix("nix-store", "--gc")
    assert not kept.exists()
    # the image does not need it
    assert "was there already" in tool.build("--safe").stderr
    shutil.rmtree(disk.parent)
    assert Path(tool.build("--safe").stdout.strip()) == disk
    assert files.digest_file(disk) == bits


def test_gc_lets_nix_have_what_no_image_needs(tool: NixTool) -> None:
    disk = Path(tool.build("--safe").stdout.strip())
    roots = tool.folder / "ravectl" / "nix" / "roots"
    tool("gc")
    assert [p.name for p in roots.iterdir()] == [disk.parent.name], "it was just made"
    then = time.time() - 3600
    os.utime(disk.parent, (then, then))
    tool("gc")
    assert not list(roots.iterdir())
