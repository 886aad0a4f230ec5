"""Every example gives a Plan, and the one that its text promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from ravectl import profile
from ravectl.model import Plan
from ravectl.plan import make_plan

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def plan_of(folder: str) -> Plan:
    chosen = profile.select(None, {}, EXAMPLES / folder / "rave.yaml")
    return make_plan(**chosen.plan_arguments())


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in EXAMPLES.glob("*/rave.yaml")))
def test_gives_a_plan_and_is_told_about(folder: str) -> None:
    assert plan_of(folder).profile == folder
    assert "ravectl up" in (EXAMPLES / folder / "README.md").read_text()


def test_minimal_gives_postgresql_its_memory() -> None:
    made = plan_of("minimal")
    assert made.machine.memory_mb == 3072
    assert made.service("postgresql").limits.memory_mb == 1024
    assert not made.network.egress


def test_claude_code_gets_the_routers_key_in_a_file() -> None:
    made = plan_of("claude-code")
    (agent,) = [a for a in made.agents if a.agent_type == "ai-engineer"]
    assert agent.network
    assert agent.credentials == {"router-key": "ccr/api-key"}
    assert "$CREDENTIALS_DIRECTORY/router-key" in agent.command[-1]
    assert [r.agent_type for r in made.webhook_rules] == ["ai-engineer"] * 2


def test_a_plain_agent_needs_nothing() -> None:
    made = plan_of("plain-agent")
    (agent,) = [a for a in made.agents if a.agent_type == "backend-architect"]
    assert (agent.command, agent.seconds, agent.memory_mb) == (("/usr/bin/wc", "--words"), 60, 64)
    assert not agent.network


def test_open_egress_opens_the_way_out() -> None:
    made = plan_of("open-egress")
    assert made.network.egress
    assert [p.name for p in made.router_providers] == ["anthropic", "local"]
