"""A profile is right, or the error says where it is wrong and what to write instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ravectl import credentials, files, images, profile
from ravectl.errors import EXIT_USAGE, ProfileError, UsageError
from ravectl.model import OPTIONAL_SERVICES, RESERVED_MB, SERVICE_NAMES, SecretKind
from ravectl.plan import make_plan
from ravectl.profile import Profile

ALWAYS = settings(deadline=None, max_examples=150)


def workspace(folder: Path, text: str | bytes) -> Path:
    path = folder / "rave.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def error(folder: Path, text: str | bytes) -> ProfileError:
    with pytest.raises(ProfileError) as caught:
        profile.select(None, {}, workspace(folder, text))
    return caught.value


# --- the shipped ones --------------------------------------------------------------------------


def test_safe_keeps_its_promises() -> None:
    p = profile.load("safe", None)
    assert (p.machine.memory_mb, p.machine.cpus, p.machine.disk_gb) == (2048, 2, 10)
    assert (p.retention.metrics, p.retention.metrics_size) == (3, 512)
    assert (p.retention.critical_metrics, p.retention.events) == (30, 7)
    assert p.retention.backups == 30
    assert p.retention.backup_every <= 15
    assert p.agents.concurrency == 1
    assert p.network.egress is False


def test_full_pipe_keeps_its_promises() -> None:
    p = profile.load("full-pipe", None)
    assert (p.machine.memory_mb, p.machine.cpus, p.machine.disk_gb) == (4096, 4, 40)
    assert (p.retention.metrics, p.retention.events, p.retention.backups) == (7, 30, 30)
    assert p.retention.backup_every <= 15
    assert p.agents.concurrency == 4
    assert p.network.egress is True


@pytest.mark.parametrize("name", profile.shipped())
def test_shipped_profiles_leave_room_for_the_system(name: str) -> None:
    p = profile.load(name, None)
    assert p.name == name
    more = OPTIONAL_SERVICES if name == "full-pipe" else ()
    assert tuple(p.services) == tuple(p.limits()) == (*SERVICE_NAMES, *more)
    assert sum(s.memory_mb for s in p.services.values()) <= p.machine.memory_mb - RESERVED_MB
    # what a person needs to get in and to keep data goes last
    by_sacrifice = sorted(p.services, key=lambda s: p.services[s].oom_score_adjust)
    assert by_sacrifice[:2] == ["postgresql", "ssh"]


# --- which one ---------------------------------------------------------------------------------

OVER_SAFE = "extends: safe\nagents: {concurrency: 3}\n"


@pytest.mark.parametrize(
    ("flag", "env", "text", "name", "concurrency"),
    [
        (None, {}, None, "safe", 1),
        ("full-pipe", {}, None, "full-pipe", 4),
        (None, {"FULL_PIPE": "1"}, None, "full-pipe", 4),
        (None, {"SAFE": "true", "FULL_PIPE": "0"}, None, "safe", 1),
        (None, {"SAFE": "", "FULL_PIPE": "Yes"}, None, "full-pipe", 4),
        ("safe", {"FULL_PIPE": "1"}, None, "safe", 1),
        ("safe", {"FULL_PIPE": "1", "SAFE": "1"}, None, "safe", 1),
        (None, {}, OVER_SAFE, "safe", 3),
        ("safe", {}, OVER_SAFE, "safe", 3),
        (None, {"SAFE": "1"}, OVER_SAFE, "safe", 3),
        ("full-pipe", {}, OVER_SAFE, "full-pipe", 4),
        (None, {"FULL_PIPE": "1"}, OVER_SAFE, "full-pipe", 4),
        (None, {}, OVER_SAFE + "name: mine", "mine", 3),
        ("mine", {}, OVER_SAFE + "name: mine", "mine", 3),
        ("safe", {}, OVER_SAFE + "name: mine", "mine", 3),
    ],
)
def test_flag_then_environment_then_workspace_then_safe(
    tmp_path: Path,
    flag: str | None,
    env: dict[str, str],
    text: str | None,
    name: str,
    concurrency: int,
) -> None:
    path = workspace(tmp_path, text) if text else None
    p = profile.select(flag, env, path)
    assert (p.name, p.agents.concurrency) == (name, concurrency)


def test_environment_that_contradicts_itself() -> None:
    with pytest.raises(UsageError, match="both set") as caught:
        profile.select(None, {"SAFE": "1", "FULL_PIPE": "1"}, None)
    assert caught.value.exit_code == EXIT_USAGE
    with pytest.raises(UsageError, match="neither on nor off"):
        profile.select(None, {"SAFE": "maybe"}, None)


def test_unknown_profile_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        profile.load("full-pip", None)
    assert caught.value.hint == "did you mean 'full-pipe'?"
    with pytest.raises(UsageError) as caught:
        profile.load("zzz", workspace(tmp_path, OVER_SAFE + "name: mine"))
    assert caught.value.hint == "the profiles are safe, full-pipe, mine"


# --- extending ---------------------------------------------------------------------------------


def test_mappings_merge_lists_and_scalars_replace(tmp_path: Path) -> None:
    text = """
        extends: safe
        machine: {memory: 3 GB}
        services: {kanban: {memory: 1 GB}}
        router:
          providers:
            - {name: local, url: "http://10.0.2.2:11434/v1", models: [qwen3]}
    """
    p = profile.select(None, {}, workspace(tmp_path, text))
    safe = profile.load("safe", None)
    assert p.machine == safe.machine.model_copy(update={"memory_mb": 3072})
    kanban = safe.services["kanban"].model_copy(update={"memory_mb": 1024})
    assert p.services == {**safe.services, "kanban": kanban}
    assert [provider.name for provider in p.router.providers] == ["local"]
    assert (p.retention, p.network, p.agents) == (safe.retention, safe.network, safe.agents)


def test_a_profile_may_stand_alone(tmp_path: Path) -> None:
    text = (files.find_data("profiles") / "safe.yaml").read_text()
    alone = workspace(tmp_path, text.replace("name: safe", "name: alone"))
    p = profile.select(None, {}, alone)
    assert p == profile.load("safe", None).model_copy(update={"name": "alone"})


def test_a_workspace_does_not_pass_for_another_shipped_profile(tmp_path: Path) -> None:
    e = error(tmp_path, "extends: safe\nname: full-pipe\n")
    assert ":2: name:" in e.message
    text = (files.find_data("profiles") / "safe.yaml").read_text()
    assert "name: 'safe' is another profile" in error(tmp_path, text).message


# --- quantities --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "mb"),
    [("2 GB", 2048), ("2GB", 2048), ("2 gib", 2048), ("2048 MB", 2048), ("2.5 GB", 2560)],
)
def test_sizes(tmp_path: Path, written: str, mb: int) -> None:
    path = workspace(tmp_path, f"extends: safe\nmachine: {{memory: {written}}}")
    assert profile.select(None, {}, path).machine.memory_mb == mb


@pytest.mark.parametrize(
    ("written", "days"), [("1 day", 1), ("48 hours", 2), ("2 weeks", 14), ("1440 min", 1)]
)
def test_times(tmp_path: Path, written: str, days: int) -> None:
    path = workspace(tmp_path, f"extends: safe\nretention: {{events: {written}}}")
    assert profile.select(None, {}, path).retention.events == days


# --- errors: line, key, cause, remedy -----------------------------------------------------------

WRONG = [
    # keys
    ("machine: {memroy: 3 GB}", 2, "machine.memroy: unknown key", "'memory'"),
    ("machne: {}", 2, "machne: unknown key", "'machine'"),
    ("zzz: 1", 2, "zzz: unknown key", "machine, services"),
    ("'a\\nb': 1", 2, r"'a\\nb': unknown key", "the keys here"),
    ("<<: {a: 1}", 2, "'<<': unknown key", "the keys here"),
    ("services: {kanbn: {memory: 3 GB}}", 2, "services.kanbn: unknown service", "'kanban'"),
    ("services: {kanban: {mem: 3 GB}}", 2, "services.kanban.mem: unknown key", "'memory'"),
    ("services: {kanban: {'[key]': 1}}", 2, "services.kanban.'[key]': unknown key", "tasks"),
    ("machine:", 2, "machine: is empty", "memory, cpus, disk"),
    ("machine: 3", 2, "machine: 3 is no group of keys", "memory, cpus, disk"),
    ("services: []", 2, "services: a list is no group of keys", "ssh, ingress"),
    ("1: 2", 2, "1: unknown key", "the keys here"),
    ("? [a]\n: b", 2, "a key is a word", "`key: value`"),
    ("machine: {cpus: 1}\nmachine: {cpus: 2}", 3, "is there already, in line 2", "remove one"),
    # units
    ("machine: {memory: 2048}", 2, "machine.memory: 2048 has no unit", "'2048 MB'"),
    ("machine: {disk: 20}", 2, "machine.disk: 20 has no unit", "'20 GB'"),
    ("scrape_every: 5", 2, "scrape_every: 5 has no unit", "'5 s'"),
    ("retention: {events: 3}", 2, "retention.events: 3 has no unit", "'3 days'"),
    ("services: {ssh: {cpu: 50}}", 2, "services.ssh.cpu: 50 has no unit", "'50 %'"),
    ("retention: {events: 3 dyas}", 2, "'dyas' is not a unit of a time", "'3 days'"),
    ("machine: {memory: 3 days}", 2, "'days' is not a unit of a size", "MB"),
    ("machine: {memory: lots}", 2, "'lots' is not a size", "'2 GB'"),
    ("machine: {memory: -2 GB}", 2, "'-2 GB' is not a size", "'2 GB'"),
    ("machine: {memory: true}", 2, "true is not a size", "'2 GB'"),
    ("machine: {memory: [1]}", 2, "a list is not a size", "'2 GB'"),
    ("retention: {events: 90 min}", 2, "'90 min' is not a whole number of days", "in days"),
    # bounds
    ("machine: {memory: 512 MB}", 2, "machine.memory: '512 MB' is less", "from '1024 MB'"),
    ("machine: {memory: 2000 TB}", 2, "machine.memory: '2000 TB' is more", "to '1048576 MB'"),
    ("machine: {disk: 1 GB}", 2, "machine.disk: '1 GB' is less", "from '4 GB'"),
    ("machine: {cpus: 0}", 2, "machine.cpus: 0 is out of bounds", "from 1 to 64"),
    ("machine: {cpus: 65}", 2, "machine.cpus: 65 is out of bounds", "from 1 to 64"),
    ("machine: {cpus: '2'}", 2, "machine.cpus: '2' is not a whole number", "without quotes"),
    ("machine: {cpus: 2.5}", 2, "machine.cpus: 2.5 is not a whole number", "digits"),
    ("machine: {cpus: true}", 2, "machine.cpus: true is not a whole number", "digits"),
    (f"machine: {{cpus: 0x{'f' * 6000}}}", 2, "machine.cpus: '0xfff", "digits"),
    ("services: {ssh: {oom_score_adjust: -1001}}", 2, "oom_score_adjust: -1001", "-1000 to 1000"),
    ("services: {ssh: {tasks: 1}}", 2, "services.ssh.tasks: 1", "from 8"),
    ("services: {ssh: {cpu: 0 %}}", 2, "services.ssh.cpu: '0 %' is less", "from '5 %'"),
    ("agents: {concurrency: 0}", 2, "agents.concurrency: 0", "from 1 to 64"),
    ("network: {ssh_port: 1023}", 2, "network.ssh_port: 1023", "from 1024 to 65535"),
    ("network: {https_port: 65536}", 2, "network.https_port: 65536", "from 1024 to 65535"),
    ("network: {ssh_port: 3333, https_port: 3333}", 2, "3333 is ssh_port already", "own"),
    ("network: {egress: ture}", 2, "network.egress: 'ture' is neither true nor false", "'true'"),
    ("network: {egress: 1}", 2, "network.egress: 1 is neither true nor false", "true or false"),
    ("retention: {metrics_size: 6 GB}", 2, "more than half of machine.disk", "'5120 MB'"),
    # names and lists
    ("name: My Team", 2, "name: 'My Team' is not a name", "'my-team'"),
    ("name: 5", 2, "name: 5 is not a text", "quotes"),
    ("name: two--\n", 2, "name: 'two--' is not a name", "'my-team'"),
    ("router: {providers: []}", 2, "router.providers: the list is empty", "at least one"),
    ("router: {providers: x}", 2, "router.providers: 'x' is not a list", "a list"),
    # files
    ("a: b: c", 2, "not YAML: mapping values are not allowed here", "quotes"),
    ("a: [", 2, "not YAML", "mend that line"),
    ("a: 'b", 2, "not YAML", "mend that line"),
    ("a: \tb\n\tc: d", 2, "not YAML", "mend that line"),
    ("a: \x07", 2, "not text: character #x0007", "mend that line"),
    ('a: "\\UFFFFFFFF"', 2, "not YAML", "mend that line"),
    ("a: !!int foo", 2, "not YAML", "mend that line"),
    ("a: !!python/object/apply:os.system [id]", 2, "tag of this value", "leave the tag out"),
    ("a: &a [1]\nb: *a", 3, "aliases are not known here", "write the value out"),
    ("a: " + "[" * 30000, 2, "nested too deeply", "docs/profiles.md"),
    ("a: b\n---\nc: d", 3, "not YAML: but found another document", "mend that line"),
]


@pytest.mark.parametrize(("text", "line", "cause", "remedy"), WRONG, ids=[w[0][:40] for w in WRONG])
def test_error_names_file_line_key_and_remedy(
    tmp_path: Path, text: str, line: int, cause: str, remedy: str
) -> None:
    e = error(tmp_path, f"extends: safe\n{text}")
    assert e.message.startswith(f"{tmp_path}/rave.yaml:{line}: ")
    assert cause in e.message
    assert remedy in e.hint
    assert e.exit_code == EXIT_USAGE
    assert_readable(e)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x",
        "http://example.org/v1",
        "https://me:pass@host/v1",  # pragma: allowlist secret
    ],
)
def test_prompts_and_keys_do_not_travel_in_clear_or_to_nowhere(tmp_path: Path, url: str) -> None:
    provider = f"{{name: a, url: '{url}', models: [m]}}"
    e = error(tmp_path, f"extends: safe\nrouter:\n  providers:\n  - {provider}")
    assert ":4: router.providers[0].url: " in e.message
    assert "https://api.anthropic.com/v1/messages" in e.hint


@pytest.mark.parametrize(
    ("models", "where"),
    [("[]", "models"), ("['a,b']", "models[0]"), ("['@API_KEY@']", "models[0]")],
)
def test_models_are_names(tmp_path: Path, models: str, where: str) -> None:
    provider = f"{{name: a, url: 'https://x/', models: {models}}}"
    e = error(tmp_path, f"extends: safe\nrouter: {{providers: [{provider}]}}")
    assert f":2: router.providers[0].{where}: " in e.message


def test_providers_have_names_of_their_own(tmp_path: Path) -> None:
    provider = "{name: a, url: 'https://x/', models: [m]}"
    e = error(tmp_path, f"extends: safe\nrouter:\n  providers:\n  - {provider}\n  - {provider}")
    assert ":5: router.providers[1].name: 'a' is there twice" in e.message


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "---\n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    e = error(tmp_path, text)
    assert "the file is empty" in e.message
    assert "extends: safe" in e.hint


def test_missing_keys_are_named_together(tmp_path: Path) -> None:
    e = error(tmp_path, "name: alone\nagents: {}\n")
    assert ":1: machine, services, network, " in e.message
    assert "extends: safe" in e.hint
    assert ":2: agents: concurrency is missing" in e.details


def test_missing_services_are_named(tmp_path: Path) -> None:
    text = (files.find_data("profiles") / "safe.yaml").read_text()
    lines = [n for n in text.splitlines() if not n.strip().startswith(("ssh:", "router: {"))]
    e = error(tmp_path, "\n".join(lines).replace("name: safe", "name: x"))
    line = 1 + lines.index("services:")
    assert f":{line}: services: no limits for ssh, router" in e.message
    assert "memory, cpu, oom_score_adjust, tasks" in e.hint


@pytest.mark.parametrize(("value", "nearest"), [("sfae", "'safe'"), ("fullpipe", "'full-pipe'")])
def test_extends_suggests_the_nearest(tmp_path: Path, value: str, nearest: str) -> None:
    e = error(tmp_path, f"name: x\nextends: {value}\n")
    assert f":2: extends: there is no profile '{value}' to extend" in e.message
    assert e.hint == f"did you mean {nearest}?"


@pytest.mark.parametrize("value", ["", "[safe]", "{safe: 1}", "3"])
def test_extends_that_is_no_name(tmp_path: Path, value: str) -> None:
    e = error(tmp_path, f"name: x\nextends: {value}\n")
    assert "is not the name of a profile" in e.message


def test_memory_promised_twice_names_sum_limit_and_largest(tmp_path: Path) -> None:
    e = error(tmp_path, "extends: safe\nservices:\n  kanban:\n    memory: 700 MB\n")
    total = sum(s.memory_mb for s in profile.load("safe", None).services.values()) + 700 - 144
    assert ":4: services.kanban.memory:" in e.message
    assert f"sums to {total} MB, 1664 MB are there" in e.message
    assert "the largest is kanban with 700 MB" in e.message
    assert f"'{total + RESERVED_MB} MB' as machine.memory" in e.hint
    assert "services.kanban.memory" in e.hint


def test_memory_sum_is_blamed_on_a_line_that_the_person_wrote(tmp_path: Path) -> None:
    e = error(tmp_path, "extends: safe\nmachine:\n  memory: 1 GB\n")
    assert f"{tmp_path}/rave.yaml:3: machine.memory:" in e.message


def test_memory_may_sum_to_the_limit_exactly(tmp_path: Path) -> None:
    others = sum(s.memory_mb for n, s in profile.load("safe", None).services.items() if n != "ssh")
    for extra, holds in ((0, True), (1, False)):
        text = f"extends: safe\nservices: {{ssh: {{memory: {1664 - others + extra} MB}}}}"
        path = workspace(tmp_path, text)
        if holds:
            profile.select(None, {}, path)
        else:
            assert "sums to 1665 MB" in error(tmp_path, text).message


def test_every_error_is_reported_in_the_order_of_lines(tmp_path: Path) -> None:
    e = error(tmp_path, "extends: safe\nagents: {concurrency: 0}\nmachine: {cpus: 0, dsk: 1 GB}\n")
    assert ":2: agents.concurrency" in e.message
    assert ":3: machine.cpus" in e.details
    assert ":3: machine.dsk: unknown key\n  did you mean 'disk'?" in e.details


# --- files that are none ------------------------------------------------------------------------


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="there is no file") as caught:
        profile.select(None, {}, tmp_path / "rave.yaml")
    assert "ravectl init" in caught.value.hint


def test_folder_pipe_and_link_to_itself(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", Path("/dev/zero")):
        with pytest.raises(ProfileError) as caught:
            profile.select(None, {}, path)
        assert_readable(caught.value)


def test_unreadable_file() -> None:
    # a regular file that not even root can read from its beginning
    with pytest.raises(ProfileError, match="cannot be read"):
        profile.select(None, {}, Path("/proc/self/mem"))


def test_binary_file(tmp_path: Path) -> None:
    assert ":2: not text in UTF-8" in error(tmp_path, b"name: x\n\xff\xfe\x00").message


def test_huge_file(tmp_path: Path) -> None:
    e = error(tmp_path, b"# comment\n" * 10_000)
    assert "larger than 64 KB" in e.message


def test_alias_bomb(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert ":2: aliases are not known here" in error(tmp_path, "\n".join(lines)).message


# --- anything at all ----------------------------------------------------------------------------


def assert_readable(e: ProfileError | UsageError) -> None:
    """One line of cause, one of remedy, in characters that every terminal takes."""
    for text in (e.message, e.hint):
        assert text
        assert len(text.splitlines()) == 1
        assert text.isprintable()
        text.encode()
    e.details.encode()


def outcome(path: Path) -> Profile | None:
    try:
        return profile.select(None, {}, path)
    except ProfileError as e:
        wrong = e
    assert_readable(wrong)
    assert str(path) in wrong.message
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@ALWAYS
@given(raw=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_give_a_profile_or_an_error(folder: Path, raw: bytes) -> None:
    outcome(workspace(folder, raw))
    outcome(workspace(folder, b"extends: safe\n" + raw))


MARKS = st.text("[]{}:,&*!|>#%@?-\"'\\~ \n\t=<.01xa", min_size=1, max_size=3)
WORDS = st.sampled_from(
    ["extends", "safe", "machine", ": ", "\n  ", "!!int ", "1e999", "2024-02-31"]
)
YAMLISH = st.lists(MARKS | WORDS, max_size=30).map("".join)


@settings(deadline=None, max_examples=500)
@given(text=YAMLISH)
def test_anything_like_yaml_gives_a_profile_or_an_error(folder: Path, text: str) -> None:
    outcome(workspace(folder, text))


def names(section: Any = None) -> list[str]:
    """Every key that the shipped profile has, at any depth."""
    section = section or yaml.safe_load((files.find_data("profiles") / "safe.yaml").read_text())
    found = list(section)
    for value in section.values():
        found += names(value) if isinstance(value, dict) else []
    return found


KEYS = st.sampled_from([*names(), "extends", "name"]) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text(max_size=12)
    | st.sampled_from(["2 GB", "3 days", "50 %", "10 s", "safe", "full-pipe", "https://x/"])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(tree=st.dictionaries(KEYS, TREES, max_size=5), extends=st.booleans())
def test_any_tree_gives_a_profile_or_an_error(
    folder: Path, tree: dict[str, Any], extends: bool
) -> None:
    if extends:
        tree = {**tree, "extends": "safe"}
    outcome(workspace(folder, yaml.safe_dump(tree, allow_unicode=True)))


def leaves(section: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in section.items():
        found += leaves(value, (*at, key)) if isinstance(value, dict) else [(*at, key)]
    return found


SAFE = yaml.safe_load((files.find_data("profiles") / "safe.yaml").read_text())


@ALWAYS
@given(at=st.sampled_from(leaves(SAFE)), value=SCALARS)
def test_one_value_overridden_is_that_value_or_an_error_on_its_line(
    folder: Path, at: tuple[str, ...], value: object
) -> None:
    tree: Any = value
    for key in reversed(at):
        tree = {key: tree}
    text = "extends: safe\n" + yaml.safe_dump(tree, allow_unicode=True)
    path = workspace(folder, text)
    p = outcome(path)
    if p is None:
        assert f"{path}:{1 + len(at)}: " in error(folder, text).message
        return
    # nothing but that value differs
    before = profile.load("safe", None).model_dump(by_alias=True)
    after = p.model_dump(by_alias=True)
    assert {k for k in leaves(before) if get(before, k) != get(after, k)} <= {at}


def get(section: Any, at: tuple[str, ...]) -> Any:
    for key in at:
        section = section[key]
    return section


# --- logs ---------------------------------------------------------------------------------------


def pem() -> str:
    return credentials.ca_certificate(credentials.new_value(SecretKind.CA_KEY))


def forwarding(url: str, ca: str | None = None, *, egress: bool = False) -> str:
    written = {"extends": "safe", "network": {"egress": egress}}
    return yaml.safe_dump({**written, "logs": {"forward": {"url": url, "ca": ca}}})


def test_the_journal_has_limits_that_fit_the_disk() -> None:
    for name in profile.shipped():
        p = profile.load(name, None)
        assert 4 * p.logs.size <= p.machine.disk_gb * 1024
        assert p.logs.forward is None
        assert p.plan_arguments()["logs"].keep_days == p.logs.keep


@pytest.mark.parametrize("key", ["size", "keep_free"])
def test_a_journal_larger_than_a_quarter_of_the_disk(tmp_path: Path, key: str) -> None:
    text = "extends: safe\nmachine: {disk: 4 GB}\nlogs: {%s: %d MB}"
    assert outcome(workspace(tmp_path, text % (key, 1024)))
    e = error(tmp_path, text % (key, 1025))
    assert "rave.yaml:3" in e.message
    assert "a quarter of machine.disk, 1024 MB" in e.message


@pytest.mark.parametrize(
    "url",
    [
        "http://logs.example.org:19532", "https://logs.example.org", "https://u:p@logs.example:1",
        "https://logs.example.org:19532/upload", "https://logs.example.org:0",
        "https://logs.example.org:65536", "https://-logs:1", "https://a b:1", "http://localhost:1",
    ],
)  # fmt: skip
def test_the_journal_does_not_travel_in_clear_or_to_nowhere(tmp_path: Path, url: str) -> None:
    assert "logs.forward.url" in error(tmp_path, forwarding(url)).message


def test_a_receiver_is_taken_apart(tmp_path: Path) -> None:
    p = profile.select(None, {}, workspace(tmp_path, forwarding("https://logs.example.org:443")))
    target = p.plan_arguments()["logs"].forward
    assert target is not None
    assert (target.host, target.port, target.encrypted) == ("logs.example.org", 443, True)


def test_a_closed_machine_reaches_its_receiver_by_name(tmp_path: Path) -> None:
    assert "by name only" in error(tmp_path, forwarding("https://192.0.2.7:443")).message
    assert outcome(workspace(tmp_path, forwarding("https://192.0.2.7:443", egress=True)))
    assert outcome(workspace(tmp_path, forwarding("http://10.0.2.2:19532")))


def test_of_an_authority_only_its_certificate_is_taken(tmp_path: Path) -> None:
    url = "https://logs.example.org:19532"
    p = profile.select(None, {}, workspace(tmp_path, forwarding(url, f"a comment\n{pem()}")))
    assert p.logs.forward is not None
    assert (p.logs.forward.ca or "").startswith("-----BEGIN CERTIFICATE-----")
    key = credentials.new_value(SecretKind.CA_KEY)
    e = error(tmp_path, forwarding(url, pem() + key))
    assert "private key" in e.message
    assert key.splitlines()[1] not in e.message + e.hint + e.details
    assert "not a certificate" in error(tmp_path, forwarding(url, "none")).message


# --- the reference ------------------------------------------------------------------------------

REFERENCE = (Path(__file__).resolve().parents[2] / "docs" / "profiles.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in REFERENCE.splitlines()
    if line.startswith("| ")
]


@pytest.mark.parametrize("column", [2, 3])
def test_reference_has_every_key_with_its_default(column: int) -> None:
    name = profile.shipped()[column - 2]
    written = yaml.safe_load((files.find_data("profiles") / f"{name}.yaml").read_text())
    services = written.pop("services")
    expected = {f"`{'.'.join(at)}`": get(written, at) for at in leaves(written)}
    expected.pop("`router.providers`")
    expected.pop("`webhooks.rules`")
    rows = {row[0]: row for row in ROWS}
    seen = {key: yaml.safe_load(rows[key][column].strip("`")) for key in expected}
    assert seen == expected
    for service, limits in services.items():
        cell = rows[f"`{service}`"][column - 1]
        assert cell == ", ".join(str(value) for value in limits.values()), service


@pytest.mark.parametrize("row", [r for r in ROWS if ":2: " in r[1]], ids=lambda r: r[0][:30])
def test_reference_shows_errors_as_they_are(tmp_path: Path, row: list[str]) -> None:
    text, cause, remedy = (cell.strip("`") for cell in row)
    e = error(tmp_path, f"extends: safe\n{text}\n")
    assert e.message == f"{tmp_path}/{cause}"
    assert e.hint == remedy


@pytest.mark.parametrize("example", REFERENCE.split("```yaml\n")[1:], ids=["extend", "providers"])
def test_examples_of_the_reference_are_valid(tmp_path: Path, example: str) -> None:
    assert outcome(workspace(tmp_path, example.split("```", maxsplit=1)[0]))


@pytest.mark.parametrize("host", ["https://otel.example.com", "http://10.0.2.2:4318"])
def test_a_collector_that_cannot_be_reached_is_an_error(tmp_path: Path, host: str) -> None:
    text = f"extends: safe\nname: mine\ntracing: {{otlp_endpoint: {host}/v1/traces}}\n"
    assert "reaches nothing outside" in str(error(tmp_path, text))
    egress = text + "network: {egress: true}\n"
    assert profile.select(None, {}, workspace(tmp_path, egress)).tracing.otlp_endpoint is not None
    local = text.replace(host, "http://127.0.0.1:4318")
    assert profile.select(None, {}, workspace(tmp_path, local)).tracing.otlp_endpoint is not None


def test_an_expression_that_re_refuses_in_another_way_is_an_error(tmp_path: Path) -> None:
    rule = (
        "{name: r, agent_type: ai-engineer, prompt: p, conditions: [{path: $.a, matches: 'a{%s}'}]}"
    )
    text = f"extends: safe\nname: mine\nwebhooks: {{rules: [{rule % ('9' * 20)}]}}\n"
    assert "repetition number is too large" in str(error(tmp_path, text))


# --- whom alerts go to --------------------------------------------------------------------------

OPEN = "extends: full-pipe\nname: mine\n"
MAIL = "{kind: email, to: a@example.org, from: b@example.org, smarthost: 'm.example.org:587'}"


def test_receivers_and_endpoints_get_into_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "rave.yaml"
    path.write_text(
        f"{OPEN}monitoring:\n  remote_write: [https://metrics.example.org/api/v1/write]\n"
        f"  receivers: [{{kind: slack, channel: '#ops'}}, {{kind: webhook}}, {MAIL}]\n"
    )
    plan = make_plan(**profile.select(None, {}, path).plan_arguments())
    assert plan.remote_write[1:] == ("https://metrics.example.org/api/v1/write",)
    assert plan.remote_write[0].startswith("http://127.0.0.1:")
    slack, webhook, mail = plan.alert_receivers
    assert (slack.channel, webhook.kind, mail.sender) == ("#ops", "webhook", "b@example.org")
    written = images.render_debian(plan).file("etc/prometheus/alertmanager.yml").content
    document = yaml.safe_load(written)
    names = [r["name"] for r in document["receivers"]]
    assert names == ["dispatcher", "slack", "webhook", "email"]
    routes = document["route"]["routes"]
    # the first that matches ends it, unless it says to go on
    assert [r.get("continue", False) for r in routes] == [True, True, True, False]
    assert [r["receiver"] for r in routes] == names
    for name in ("slack-url", "webhook-url"):
        assert f"/run/secrets/alerts/{name}" in written


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("extends: safe\nmonitoring: {receivers: [{kind: webhook}]}", "reaches nothing outside"),
        ("extends: safe\nmonitoring: {remote_write: [https://x.org/w]}", "reaches nothing outside"),
        (OPEN + "monitoring: {receivers: [{kind: slack}]}", "of kind slack lacks channel"),
        (OPEN + "monitoring: {receivers: [{kind: webhook, channel: '#a'}]}", "has no channel"),
        (OPEN + "monitoring: {receivers: [{kind: webhook}, {kind: webhook}]}", "is there twice"),
        (OPEN + "monitoring: {receivers: [{kind: slack, channel: ops}]}", "is not a channel"),
        (OPEN + "monitoring: {receivers: [{kind: email, to: a@b.org}]}", "lacks from, smarthost"),
        (OPEN + "monitoring: {remote_write: [http://x.org/w]}", "is not the address of a receiver"),
        (OPEN + "monitoring: {remote_write: ['https://x.org/w?token=x']}", "nothing secret in it"),
        (OPEN + "monitoring: {remote_write: ['http://127.0.0.1:8428/api/v1/write']}", "is not the"),
        (OPEN + "monitoring: {remote_write: ['https://x.org:99999/w']}", "99999 is no port"),
        (OPEN + "monitoring: {remote_write: [https://x.org/w, https://x.org/w]}", "there twice"),
    ],
)
def test_receivers_that_cannot_work_are_refused(tmp_path: Path, text: str, cause: str) -> None:
    assert cause in error(tmp_path, text).message


KEY = """-----BEGIN PGP PUBLIC KEY BLOCK-----

mDMEZw==
=abcd
-----END PGP PUBLIC KEY BLOCK-----"""


def grafana(**rows: str) -> str:
    text = "extends: full-pipe\nname: mine\nmonitoring:\n  grafana:\n"
    for key, value in rows.items():
        text += f"    {key}: |\n" + "".join(f"      {line}\n" for line in value.splitlines())
    return text


def test_grafana_comes_with_limits_unless_they_are_said(tmp_path: Path) -> None:
    text = "extends: safe\nname: mine\nmachine: {memory: 3 GB}\n"
    asked = text + "monitoring: {grafana: {enabled: true}}\n"
    assert "grafana" not in profile.select(None, {}, workspace(tmp_path, text)).limits()
    limits = profile.select(None, {}, workspace(tmp_path, asked)).limits()
    assert (limits["grafana"].memory_mb, "tempo" in limits) == (256, False)
    own = "services: {grafana: {memory: 300 MB, cpu: 50 %, oom_score_adjust: 0, tasks: 64}}\n"
    said = profile.select(None, {}, workspace(tmp_path, asked + own)).limits()
    assert said["grafana"].memory_mb == 300


def test_grafana_counts_in_the_sum_of_memory(tmp_path: Path) -> None:
    text = "extends: safe\nname: mine\nmonitoring: {grafana: {enabled: true}}\n"
    found = error(tmp_path, text)
    assert "the services' memory sums to" in found.message
    assert "as machine.memory" in (found.hint or "")


def test_a_package_source_comes_with_the_key_that_signs_it(tmp_path: Path) -> None:
    both = grafana(apt_source="https://apt.example.org/ stable main", apt_key=KEY)
    # `|` keeps the line's end, which is none of the source
    both = both.replace("apt_source: |\n      ", "apt_source: ")
    source = profile.select(None, {}, workspace(tmp_path, both)).plan_arguments()["grafana_source"]
    assert source is not None
    assert source.key == KEY + "\n"
    alone = grafana(apt_key=KEY)
    assert "apt_source is missing" in error(tmp_path, alone).message


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("apt_key", KEY.replace("PUBLIC", "PRIVATE"), "there is a private key in it"),
        ("apt_key", "mDMEZw==", "it is no public key"),
        ("apt_key", f"{KEY}\n{KEY}", "it is no public key"),
        ("apt_source", "http://apt.example.org/ stable main", "is not a package source"),
        ("apt_source", "https://apt.example.org/ stable", "is not a package source"),
        ("apt_source", "https://x/ [trusted=yes] stable main", "is not a package source"),
    ],
)
def test_what_is_no_signed_source_is_refused(
    tmp_path: Path, key: str, value: str, cause: str
) -> None:
    text = grafana(**{key: value})
    assert cause in error(tmp_path, text).message
