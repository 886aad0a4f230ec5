"""What is shipped for the dispatcher: the machine's configuration, examples, and enough tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rave_dispatcher.config import Config, load
from rave_dispatcher.domain.rules import concerned, first_match
from rave_dispatcher.domain.tasks import AgentType
from ravectl import files, images, profile
from ravectl.engines import debian
from ravectl.errors import ProfileError
from ravectl.plan import make_plan
from ravectl.verify.events import EVENT_TYPE

ROOT = Path(__file__).resolve().parents[2]
PAYLOADS = {p.stem: p for p in (ROOT / "tests/integration/payloads").glob("*.json")}


def shipped(name: str, tmp_path: Path) -> Config:
    plan = make_plan(**profile.load(name, None).plan_arguments())
    path = tmp_path / "dispatcher.yaml"
    path.write_text(images.render_debian(plan).file("etc/rave/dispatcher.yaml").content)
    return load(path)


@pytest.mark.parametrize("name", profile.shipped())
def test_the_machines_configuration_is_its_profiles(name: str, tmp_path: Path) -> None:
    plan = make_plan(**profile.load(name, None).plan_arguments())
    config = shipped(name, tmp_path)
    assert config.store.retention_days == plan.retention.events_days
    assert config.tasks.concurrency == plan.agent_concurrency
    assert set(config.agents) == set(AgentType)
    limits = sum(s.limits.memory_mb for s in plan.services)
    for agent in config.agents.values():
        assert agent.network == plan.network.egress
        # all tasks at once fit beside the services
        assert limits + agent.memory_mb * plan.agent_concurrency <= plan.service_memory_mb
    secrets = {s.name for s in plan.delivered()}
    for source in config.sources.values():
        assert f"dispatcher/{source.secret}" in secrets


@pytest.mark.parametrize(
    ("payload", "prompt"),
    [
        ("gitlab-merge-request", "Review this change: MS-Viewport\n\nCloses #23"),
        ("github-pull-request", "Review this change: Update the README with new information."),
        ("gitlab-issue", "Work on this issue: New API: create/update/delete file"),
        ("github-issues", None),  # without the label
        ("gitlab-push", None),
        ("gitlab-pipeline", None),
        ("github-ping", None),
        ("github-push", None),
    ],
)
def test_what_becomes_of_real_events(payload: str, prompt: str | None, tmp_path: Path) -> None:
    rules = tuple(r.rule() for r in shipped("safe", tmp_path).rules)
    recorded = json.loads(PAYLOADS[payload].read_text())
    headers = recorded["headers"]
    kind = headers.get("X-Gitlab-Event") or headers["X-GitHub-Event"]
    rule = first_match(concerned(rules, payload.partition("-")[0], kind), recorded["body"])
    if prompt is None:
        assert rule is None
    else:
        assert rule is not None
        assert rule.render(recorded["body"]).startswith(prompt)


def rendered(folder: Path, text: str) -> Config:
    """The machine's configuration, of what a person writes in rave.yaml."""
    (folder / "rave.yaml").write_text(text)
    plan = make_plan(**profile.select(None, {}, folder / "rave.yaml").plan_arguments())
    path = folder / "dispatcher.yaml"
    path.write_text(images.render_debian(plan).file("etc/rave/dispatcher.yaml").content)
    return load(path)


@pytest.mark.parametrize("name", ["claude-code", "plain-agent"])
def test_examples_reach_the_dispatcher(name: str, tmp_path: Path) -> None:
    text = (ROOT / "examples" / name / "rave.yaml").read_text()
    written = yaml.safe_load(text)
    config = rendered(tmp_path, text)
    for kind, agent in written["agents"]["types"].items():
        assert list(config.agents[AgentType(kind)].command) == agent["command"]
        assert config.agents[AgentType(kind)].credentials == agent.get("credentials", {})
    # the first is the machine's own
    assert [r.prompt for r in config.rules[1:]] == [
        r["prompt"] for r in written["webhooks"]["rules"]
    ]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    prompt=TEXT, value=st.one_of(TEXT, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none())
)
def test_what_a_profile_says_arrives_as_it_is(prompt: str, value: object, tmp_path: Path) -> None:
    rule = {
        "name": "x", "agent_type": "ai-engineer", "prompt": prompt, "types": ["a:b", "- c"],
        "conditions": [{"path": "$.a", "equals": value}], "command": ["a b", "#c", "'\"\\"],
    }  # fmt: skip
    try:
        config = rendered(
            tmp_path, yaml.safe_dump({"extends": "safe", "webhooks": {"rules": [rule]}})
        )
    except ProfileError:
        assume(False)  # a JSONPath that is none
    made = config.rules[1]
    assert (made.prompt, made.types, made.command) == (
        prompt,
        ("a:b", "- c"),
        ("a b", "#c", "'\"\\"),
    )
    assert made.conditions[0].equals == value
    assert type(made.conditions[0].equals) is type(value)


def test_verifys_own_rule_comes_first_and_asks_no_agent(tmp_path: Path) -> None:
    config = rendered(tmp_path, (ROOT / "examples/claude-code/rave.yaml").read_text())
    rules = tuple(r.rule() for r in config.rules)
    rule = first_match(concerned(rules, "github", EVENT_TYPE), {})
    assert rule is not None
    agent = config.agent(rule.agent_type, rule.name)
    assert agent is not None
    assert agent.command == ("/usr/bin/env", "tee", "TASK.md")
    own = config.agent("ai-engineer", None)
    assert own is not None
    assert own.command[0] == "/usr/local/bin/claude"
    assert config.agent("nobody", None) is None


def test_every_key_is_in_the_reference() -> None:
    text = (ROOT / "docs/dispatcher.md").read_text()
    for name, field in Config.model_fields.items():
        assert f"`{name}" in text or f", `{name}`" in text, name
        inner = getattr(field.annotation, "model_fields", {})
        for key in inner:
            assert f"`{key}`" in text or f"`{name}.{key}`" in text, f"{name}.{key}"


def test_the_machine_gets_the_code_that_is_tested_and_no_wheel_strays() -> None:
    source = files.package_source("rave_dispatcher")
    here = ROOT / "src" / "rave_dispatcher"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "."],
        cwd=here, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert set(source) == set(tracked.stdout.split())
    assert debian._place_in_site("a/b.py") == "a/b.py"
    assert debian._place_in_site("a-1.data/purelib/a.py") == "a.py"
    assert debian._place_in_site("a-1.data/scripts/a") is None


def test_domain_and_application_are_covered(tmp_path: Path) -> None:
    """The tests of the use cases run nearly every line of them, counted here."""
    tests = [
        ROOT / f"tests/unit/test_dispatcher_{n}.py" for n in ("domain", "tasks", "application")
    ]
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests,
            "--cov=rave_dispatcher.domain", "--cov=rave_dispatcher.application",
            "--cov-fail-under=95", "--cov-report=term-missing",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env={
            "PATH": "/usr/bin:/bin", "COVERAGE_FILE": str(tmp_path / "coverage"),
            "PYTHONPATH": str(ROOT / "src"),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
