"""Agent tasks find programs where systemd's own PATH does not lead to them: on NixOS."""

from __future__ import annotations

from rave_dispatcher.adapters.runners.unit import Order, systemd_run_argv
from rave_dispatcher.config import Agent

ORDER = Order(
    "01a20fd0-8a31-717b-8313-d720ca1794d8", 1, "ai-engineer", f"00-{'a' * 32}-{'b' * 16}-01"
)
AGENT = Agent(command=("claude", "--print"), memory_mb=700, cpu_percent=150, seconds=60)


def paths(agent: Agent, search: str | None) -> list[str]:
    argv = systemd_run_argv(ORDER, agent, "agent", "/w", "/p", "/o", search)
    return [word for word in argv if word.startswith("--setenv=PATH=")]


def test_a_task_has_the_path_of_its_launcher() -> None:
    assert paths(AGENT, "/sw/bin") == ["--setenv=PATH=/sw/bin"]
    assert paths(AGENT, None) == paths(AGENT, "") == []


def test_an_agent_may_have_its_own() -> None:
    own = AGENT.model_copy(update={"environment": {"PATH": "/opt/bin"}})
    assert paths(own, "/sw/bin") == ["--setenv=PATH=/opt/bin"]
