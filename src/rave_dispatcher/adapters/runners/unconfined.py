"""Runs agents as plain processes with the dispatcher's own rights: for development and tests.

Given a cgroup v2 folder that it may write, each task gets a cgroup below it, which counts what
the task uses and ends all of its processes; without one, a process group does the latter, and
nothing is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rave_dispatcher.adapters.runners.unit import make_usage
from rave_dispatcher.adapters.tracing import traceparent
from rave_dispatcher.application.ports import Job, Ran
from rave_dispatcher.config import Agent
from rave_dispatcher.domain.tasks import Outcome, Usage

# enters the cgroup before the agent's command begins, so that nothing goes uncounted
_ENTER = 'echo $$ >"$0"/cgroup.procs && exec "$@"'
GRACE_SECONDS = 2.0


FindAgent = Callable[[str, str | None], Agent | None]  # by type and rule


class UnconfinedProcessRunner:
    """The runner port, without any limits but time."""

    def __init__(self, agents: FindAgent, home: Path, cgroup: Path | None = None) -> None:
        self._agent, self._home, self._cgroup = agents, home, cgroup

    async def run(self, job: Job, on_output: Callable[[bytes], Awaitable[None]]) -> Ran:
        """Run an agent to its end."""
        agent = self._agent(job.agent_type.value, job.rule)
        if agent is None:
            detail = f"no command is configured for {job.agent_type}"
            return Ran(Outcome.NOT_STARTED, detail, Usage(0, None, None))
        group = self._make_cgroup(job)
        argv = list(agent.command)
        if group is not None:
            argv = ["/bin/sh", "-c", _ENTER, str(group), *argv]
        began = time.monotonic()
        process = None
        try:
            process = await self._start(argv, agent, job)
            outcome, detail = await _converse(process, job.prompt, on_output, agent.seconds)
        except OSError as e:
            outcome, detail = Outcome.NOT_STARTED, f"its command could not be run: {e.strerror}"
        finally:
            await _end(process, group)
            usage = _usage(group, began)
            if group is not None:
                await _remove(group)
        return Ran(outcome, detail, usage)

    def _make_cgroup(self, job: Job) -> Path | None:
        if self._cgroup is None:
            return None
        group = self._cgroup / f"rave-task-{job.task_id}-{job.attempt}"
        group.mkdir(exist_ok=True)
        return group

    async def _start(self, argv: list[str], agent: Agent, job: Job) -> asyncio.subprocess.Process:
        workdir = self._home / "tasks" / job.task_id
        workdir.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ.get("PATH", os.defpath), **agent.environment,
            "HOME": str(workdir), "TRACEPARENT": traceparent(job.trace),
            "RAVE_TASK_ID": job.task_id,
        }  # fmt: skip
        return await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, cwd=workdir, env=environment,
            start_new_session=True,
        )  # fmt: skip


async def _converse(
    process: asyncio.subprocess.Process,
    prompt: str,
    on_output: Callable[[bytes], Awaitable[None]],
    seconds: float,
) -> tuple[Outcome, str]:
    assert process.stdin is not None
    assert process.stdout is not None
    feeding = asyncio.create_task(_feed(process.stdin, prompt.encode("utf-8", "replace")))
    try:
        async with asyncio.timeout(seconds):
            while data := await process.stdout.read(65536):
                await on_output(data)
            code = await process.wait()
    except TimeoutError:
        return Outcome.TIMED_OUT, f"it took longer than {seconds} s"
    finally:
        feeding.cancel()
    if code == 0:
        return Outcome.SUCCEEDED, ""
    return Outcome.ERROR, f"exit code {code}" if code > 0 else f"signal {-code}"


async def _feed(stdin: asyncio.StreamWriter, prompt: bytes) -> None:
    with contextlib.suppress(OSError):  # an agent need not read its prompt
        stdin.write(prompt)
        await stdin.drain()
        stdin.close()


async def _end(process: asyncio.subprocess.Process | None, group: Path | None) -> None:
    """End all that the task started."""
    if process is None:
        return
    try:
        await _end_in_order(process, group)
    except asyncio.CancelledError:  # a service that ends has no more time: at once, then
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        if group is not None:
            with contextlib.suppress(OSError):
                (group / "cgroup.kill").write_text("1")  # also who left the process group


async def _end_in_order(process: asyncio.subprocess.Process, group: Path | None) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await asyncio.shield(process.wait())
            if number is signal.SIGTERM and group is None:
                continue  # what ignores SIGTERM may still be in the process group
            break


def _usage(group: Path | None, began: float) -> Usage:
    duration_us = int((time.monotonic() - began) * 1e6)
    if group is None:
        return make_usage(duration_us, None, None)
    return make_usage(duration_us, _peak(group), _cpu_us(group))


def _peak(group: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((group / "memory.peak").read_text())
    return None  # the memory controller is not there


def _cpu_us(group: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "cpu.stat").read_text().splitlines():
            if line.startswith("usage_usec "):
                return int(line.split()[1])
    return None


async def _remove(group: Path) -> None:
    for _ in range(100):
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:  # a process of it is still ending
            await asyncio.sleep(0.02)
