"""The running service: which parts there are, in which order they begin and end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import cast

from rave_dispatcher import __version__
from rave_dispatcher.adapters.clock import BelievedClock, SystemChance, SystemClock
from rave_dispatcher.adapters.deadline import CpuDeadline
from rave_dispatcher.adapters.http.api import Services, make_app, receive_webhook
from rave_dispatcher.adapters.http.gate import App, Gate, Receive, Scope, Send
from rave_dispatcher.adapters.http.server import Server, make_server
from rave_dispatcher.adapters.logs import JsonLog, where
from rave_dispatcher.adapters.prometheus import Metrics
from rave_dispatcher.adapters.runners.systemd import SystemdRunner
from rave_dispatcher.adapters.runners.unconfined import UnconfinedProcessRunner
from rave_dispatcher.adapters.secrets import SecretFiles
from rave_dispatcher.adapters.signatures import Signatures
from rave_dispatcher.adapters.store import connection, maintenance
from rave_dispatcher.adapters.store.sqlite import EventStore
from rave_dispatcher.adapters.systemd import Notifier, Sockets
from rave_dispatcher.adapters.tracing import OtelTracer, Provider, make_provider
from rave_dispatcher.application.collect_metrics import CollectMetrics
from rave_dispatcher.application.errors import DispatcherError
from rave_dispatcher.application.execute_agent_task import ExecuteAgentTask, Execution
from rave_dispatcher.application.manage_tasks import ManageTasks
from rave_dispatcher.application.ports import Runner
from rave_dispatcher.application.process_webhook import Policy, ProcessWebhook
from rave_dispatcher.config import Config

DRAIN_SECONDS = 5  # for requests under way; tasks are ended meanwhile; all within 10 s
# of the processor, for one event: nothing else is served meanwhile. A payload of 1 MB that is all
# labels takes `$..labels` 0.35 s, and ten times that where the processor is emulated
RULES_SECONDS = 5.0
CHECKPOINT_SECONDS = 1.0
PRUNE_SECONDS, CHECK_SECONDS = 3600.0, 86_400.0
# a machine that somebody uses for half an hour a day needs both too
FIRST_PRUNE_SECONDS, FIRST_CHECK_SECONDS = 60.0, 900.0
IDLE_SECONDS = 1.0
CONSOLE_CONNECTIONS = 64  # pages that are open at once


def make_runner(config: Config) -> Runner:
    """What runs agents, as configured."""
    if config.runner.kind == "systemd":
        return SystemdRunner(config.runner.socket)
    return UnconfinedProcessRunner(config.agent, config.runner.home, config.runner.cgroup)


@dataclass
class Service:
    """All parts. Made by `start`; `run` until `stop`; then `close`."""

    config: Config
    notifier: Notifier
    store: EventStore
    provider: Provider
    metrics: Metrics
    secrets: SecretFiles
    log: JsonLog
    clock: SystemClock
    believed: BelievedClock
    rules_wake: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def start(cls, config: Config, notifier: Notifier) -> Service:
        """Open the store and make the parts. Raises CorruptStoreError, DispatcherError."""
        store = await EventStore.open(config.store.path, int(config.store.reserve_mb * 2**20))
        clock = SystemClock()
        service = cls(
            config=config, notifier=notifier, store=store,
            provider=make_provider(store.post_spans, config.tracing.otlp_endpoint),
            metrics=Metrics(), secrets=SecretFiles(config.secrets_dir), log=JsonLog(),
            clock=clock, believed=BelievedClock(clock),
        )  # fmt: skip
        service._wire()
        taken_back = await service.executor.recover()
        service.log.info("started", version=__version__, tasks_taken_back=taken_back)
        return service

    def _wire(self) -> None:
        config, chance = self.config, SystemChance()
        tracer = OtelTracer(self.provider)
        self.webhooks = ProcessWebhook(
            self.store, Signatures(config.sources, self.secrets.accepted, time.time), self.clock,
            chance, tracer, self.metrics, self.log,
            Policy(
                tuple(r.rule() for r in config.rules), config.limits.depth,
                config.tasks.max_attempts,
            ),
            CpuDeadline(RULES_SECONDS),
        )  # fmt: skip
        self.executor = ExecuteAgentTask(
            self.store, make_runner(config), self.clock, chance, tracer, self.metrics, self.log,
            Execution(
                config.tasks.concurrency, int(config.tasks.lease_seconds * 1000),
                config.tasks.backoff(), config.tasks.max_output,
            ),
        )  # fmt: skip
        services = Services(
            webhooks=self.webhooks,
            tasks=ManageTasks(
                self.store, self.clock, chance, config.tasks.max_attempts, self.rules_wake.set,
                self.executor.wake,
            ),
            collect=CollectMetrics(self.store, self.clock, self.metrics),
            metrics=self.metrics, store=self.store,
            tokens=lambda: self.secrets.accepted(config.api_token),
            alert_tokens=lambda: self.secrets.accepted(config.alerts_token),
            faults=self.faults, wake_rules=self.rules_wake.set,
        )  # fmt: skip
        self.checkpointer = maintenance.Checkpointer(
            self.store.path, self.store.writer, asyncio.to_thread
        )
        app = Gate(
            make_app(services), config.limits, tracer, self.metrics,
            functools.partial(receive_webhook, services),
        )  # fmt: skip
        self.server: Server = make_server(app, config.limits, DRAIN_SECONDS)
        limits = config.limits.model_copy(update={"connections": CONSOLE_CONNECTIONS})
        self.console_server: Server = make_server(self._console(), limits, DRAIN_SECONDS)

    def _console(self) -> App:
        """The console. It is made with its first request: a start need not wait for it."""
        made: App | None = None

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal made
            if made is None:
                from rave_dispatcher.adapters.console import app, parts  # noqa: PLC0415

                content = parts.Parts(self.config.console, self.store, self.faults)
                made = app.Console(content, self.store, self.metrics)
            await made(scope, receive, send)

        return serve

    def faults(self) -> list[str]:
        """Why requests cannot be served now."""
        found = []
        if self.stopping.is_set():
            found.append("stopping")
        if self.store.writer.corrupt:
            found.append("the event store is damaged")
        if connection.free_bytes(self.store.path) < self.config.store.reserve_mb * 2**20:
            found.append("hardly any disk space is left")
        if not self.secrets.accepted(self.config.api_token):
            found.append("there is no API token")
        return found

    def stop(self) -> None:
        """Begin to end."""
        if not self.stopping.is_set():
            self.notifier.say("STOPPING=1")
            self.stopping.set()
            self.server.should_exit = self.console_server.should_exit = True

    async def run(self, sockets: Sockets) -> int:
        """Serve until told to stop, or until a part fails."""
        work = {
            "executor": self.executor.run(),
            "rules": self._rules(),
            "watchdog": self._watch(),
            "checkpoints": self._every(CHECKPOINT_SECONDS, self._checkpoint),
            "retention": self._every(PRUNE_SECONDS, self._prune, FIRST_PRUNE_SECONDS),
            "integrity": self._every(CHECK_SECONDS, self._check, FIRST_CHECK_SECONDS),
        }
        parts = [asyncio.create_task(part, name=name) for name, part in work.items()]
        serving = [asyncio.create_task(self.server.serve(sockets.api))]
        if sockets.console:
            serving.append(asyncio.create_task(self.console_server.serve(sockets.console)))
        ready = asyncio.create_task(self._say_ready())
        stopping = asyncio.create_task(self.stopping.wait())
        try:
            # tasks are given back at once, not after the last answer: their units may be ended, too
            ends = [*serving, *parts, stopping]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            failed = [p for p in parts if p.done()]
            for part in failed:
                error = None if part.cancelled() else part.exception()
                self.log.error(
                    "a part of the dispatcher ended",
                    part=part.get_name(), error=where(error) if error else "cancelled",
                )  # fmt: skip
        finally:
            self.stop()
            ready.cancel()
            stopping.cancel()
            for part in parts:
                part.cancel()
            await asyncio.wait([*serving, *parts], timeout=DRAIN_SECONDS + 2)
        return 1 if failed else 0

    async def close(self) -> None:
        """Let nothing be lost: spans, then the store."""
        self.log.info("ended")
        await asyncio.to_thread(self.provider.finish)
        await self.store.close()

    async def _say_ready(self) -> None:
        while not self.server.started:
            await asyncio.sleep(0.005)
        self.notifier.say("READY=1")
        self.log.info("ready")

    async def _rules(self) -> None:
        """Show the rules what came."""
        while True:
            try:
                if await self.webhooks.process():
                    self.executor.wake()
                    continue
            except DispatcherError as e:
                self.log.warning("events wait for the store", error=e.slug)
                await asyncio.sleep(IDLE_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SECONDS):
                    await self.rules_wake.wait()
            self.rules_wake.clear()

    async def _watch(self) -> None:
        """Tell systemd that we live, as long as the store's writer does."""
        seconds = self.notifier.watchdog_seconds
        while seconds is None:
            await asyncio.sleep(3600)
        while True:
            with contextlib.suppress(DispatcherError):  # refused is an answer too
                await self.store.writer.submit(lambda _: None, grows=False)
            self.notifier.say("WATCHDOG=1")
            await asyncio.sleep(seconds / 3)

    async def _every(
        self, seconds: float, work: Callable[[], Awaitable[None]], first: float | None = None
    ) -> None:
        await asyncio.sleep(seconds if first is None else first)
        while True:
            try:
                await work()
            except Exception as e:  # it comes again, and must not end the service
                self.log.error(
                    "maintenance failed", part=getattr(work, "__name__", ""), error=where(e)
                )
            await asyncio.sleep(seconds)

    async def _checkpoint(self) -> None:
        await self.checkpointer.look()
        self.metrics.corrupt.set(1 if self.store.writer.corrupt else 0)

    async def _prune(self) -> None:
        before = self.believed.now_ms() - int(self.config.store.retention_days * 86_400_000)
        deleted = await maintenance.prune(self.store.writer, before)
        self.log.info("old events were deleted", rows=deleted)

    async def _check(self) -> None:
        checker = maintenance.Checker(self.store.path)
        try:
            found = await asyncio.to_thread(checker.run)
        except asyncio.CancelledError:
            checker.stop()
            raise
        if found is not None:
            self.store.writer.corrupt = found
            self.log.error(connection.RESTORE.format(path=self.store.path, why=found))


def openapi_document() -> str:
    """The API's description, as it is checked in."""
    nothing = cast(Services, None)
    return json.dumps(make_app(nothing).openapi(), indent=2, ensure_ascii=False)
