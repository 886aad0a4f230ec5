"""Runs agents in transient units, by way of the launcher.

The dispatcher has no privilege to start units: whoever could start any unit is root. It
connects to a socket of systemd's, which starts the launcher as root for this one task; the
launcher takes from it a task's id, its type and its prompt, and all else from the
configuration. Hanging up ends the task.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

from rave_dispatcher.adapters.runners import frames
from rave_dispatcher.adapters.runners.unit import Order
from rave_dispatcher.adapters.tracing import traceparent
from rave_dispatcher.application.ports import Job, Ran, RunnerUnavailableError
from rave_dispatcher.domain.tasks import Outcome, Usage


class SystemdRunner:
    """The runner port, for a machine with systemd."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def run(self, job: Job, on_output: Callable[[bytes], Awaitable[None]]) -> Ran:
        """Run an agent to its end. Raises RunnerUnavailableError when the launcher did not say that
        it has begun: what it lacks, each task would lack."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket)
        except OSError as e:
            raise RunnerUnavailableError(f"the launcher cannot be reached: {e.strerror}") from None
        begun = False
        try:
            prompt = job.prompt.encode("utf-8", "replace")
            order = Order(
                job.task_id, job.attempt, job.agent_type.value, traceparent(job.trace), job.rule
            )  # fmt: skip
            head = {**dataclasses.asdict(order), "prompt_bytes": len(prompt)}
            writer.write(json.dumps(head).encode() + b"\n" + prompt)
            await writer.drain()
            kind, size = frames.unpack_head(await reader.readexactly(frames.HEAD_SIZE))
            begun = True
            return await _follow(reader, on_output, kind, size)
        except (OSError, EOFError, ValueError, KeyError):
            if not begun:
                raise RunnerUnavailableError("the launcher ended without a word") from None
            return _lost("the launcher ended without a result")
        finally:
            # the launcher takes this as the end of the task, and ends all of it
            writer.close()


async def _follow(
    reader: asyncio.StreamReader,
    on_output: Callable[[bytes], Awaitable[None]],
    kind: bytes,
    size: int,
) -> Ran:
    """All frames, from the one that begins so."""
    while kind != frames.RESULT:
        content = await reader.readexactly(size)
        if kind == frames.OUTPUT:
            await on_output(content)
        kind, size = frames.unpack_head(await reader.readexactly(frames.HEAD_SIZE))
    r = json.loads(await reader.readexactly(size))
    usage = Usage(r["duration_ms"], r["memory_usage_mb"], r["cpu_usage_percent"])
    return Ran(Outcome(r["outcome"]), str(r["detail"])[:500], usage)


def _lost(why: str) -> Ran:
    return Ran(Outcome.NOT_STARTED, why, Usage(0, None, None))
