"""The routes. What they do is in the use cases; what all pass is in gate.py."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from rave_dispatcher import __version__
from rave_dispatcher.adapters.http import contract, problems
from rave_dispatcher.adapters.prometheus import Metrics
from rave_dispatcher.adapters.store.sqlite import EventStore
from rave_dispatcher.application.collect_metrics import CollectMetrics
from rave_dispatcher.application.errors import MalformedError, UnauthenticatedError
from rave_dispatcher.application.manage_tasks import ManageTasks
from rave_dispatcher.application.ports import EventFilter, TaskFilter, Verified
from rave_dispatcher.application.process_webhook import ProcessWebhook
from rave_dispatcher.domain.events import MAX_PROJECT, Trace
from rave_dispatcher.domain.tasks import AgentType, Status

ALERT_SOURCE = "alertmanager"
LOG_MOST = 256 * 1024

_BEARER = HTTPBearer(auto_error=False, description="The secret dispatcher/api-token")
Cursor = Annotated[str | None, Query(max_length=100)]
Limit = Annotated[int, Query(ge=1, le=200)]
Text = Annotated[str | None, Query(max_length=MAX_PROJECT)]


@dataclass(frozen=True)
class Services:
    """What the routes need."""

    webhooks: ProcessWebhook
    tasks: ManageTasks
    collect: CollectMetrics
    metrics: Metrics
    store: EventStore
    tokens: Callable[[], tuple[bytes, ...]]
    alert_tokens: Callable[[], tuple[bytes, ...]]  # of /alerts, beside those
    faults: Callable[[], list[str]]  # why no requests can be served now
    wake_rules: Callable[[], None]


def _problem(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {
            "description": "Refused",
            "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


def make_app(services: Services) -> FastAPI:
    """The application, without the gate."""
    app = FastAPI(
        title="RAVE dispatcher",
        version=__version__,
        description="Webhooks in, nothing lost, agent tasks out. Errors are problem+json "
        "(RFC 9457) with the id of their trace.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    problems.install(app)

    def authorize(kind: str, accepted: Callable[[], tuple[bytes, ...]]) -> Any:
        def judge(
            bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        ) -> None:
            given = bearer.credentials.encode("utf-8", "replace") if bearer else b""
            if not _matches(given, accepted()):
                services.metrics.auth_failed(kind)
                raise UnauthenticatedError("a valid bearer token is needed", kind)

        return Depends(judge)

    # the services are looked at when a request comes: the API's description is made without them
    api_token = authorize("api-token", lambda: services.tokens())  # noqa: PLW0108 - not yet there
    alerts_token = authorize("alerts-token", lambda: services.tokens() + services.alert_tokens())
    app.include_router(_webhooks(services))
    app.include_router(_alerts(services), dependencies=[alerts_token])
    for make in (_events, _tasks, _task, _more):
        app.include_router(
            make(services), prefix="/v1", dependencies=[api_token],
            responses=_problem(400, 401, 408, 410, 413, 415, 429, 503),
        )  # fmt: skip
    app.include_router(_operations(services))
    _describe_problems(app)
    return app


def _matches(given: bytes, tokens: tuple[bytes, ...]) -> bool:
    found = False
    for token in tokens:
        found |= hmac.compare_digest(given, token)
    return found


def _describe_problems(app: FastAPI) -> None:
    """Have the OpenAPI document say what errors look like."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        schemas = document["components"]["schemas"]
        schemas["Problem"] = contract.Problem.model_json_schema()
        for path in document["paths"].values():
            for operation in path.values():
                if "422" in operation["responses"]:
                    operation["responses"]["422"] = _problem(422)[422]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _trace(request: Request) -> Trace:
    trace: Trace = request.state.trace
    return trace


def _webhooks(services: Services) -> APIRouter:
    router = APIRouter(tags=["webhooks"])

    @router.post(
        "/webhooks/{source}",
        status_code=202,
        response_model=contract.Receipt,
        responses=_problem(400, 401, 404, 408, 413, 415, 422, 429, 503, 507),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"type": ["object", "array"]}}},
            }
        },
    )
    async def receive(source: str, request: Request) -> Response:
        """Take a signed webhook. With a 202 it is durable; a duplicate changes nothing."""
        return await receive_webhook(services, source, request.scope)

    return router


async def receive_webhook(
    services: Services, source: str, scope: MutableMapping[str, Any]
) -> Response:
    """What that route does; the gate calls it too, without the framework between."""
    state = scope["state"]
    receipt = await services.webhooks.receive(
        source, state["headers"], state["body"], state["trace"]
    )
    services.wake_rules()
    return _receipt(receipt.event_uuid, receipt.trace_id, receipt.duplicate)


def _receipt(event_uuid: str, trace_id: str, duplicate: bool) -> Response:
    # three values whose characters are known: faster than any serializer
    text = (
        f'{{"event_uuid":"{event_uuid}","trace_id":"{trace_id}",'
        f'"duplicate":{"true" if duplicate else "false"}}}'
    )
    return Response(text, 202, media_type="application/json")


def _alerts(services: Services) -> APIRouter:
    router = APIRouter(tags=["alerts"])

    @router.post(
        "/alerts",
        status_code=202,
        response_model=contract.Receipt,
        responses=_problem(400, 401, 408, 413, 415, 429, 503, 507),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"type": "object"}}},
            }
        },
    )
    async def alert(request: Request) -> Response:
        """Take a notification of Alertmanager; it becomes an event that rules may match."""
        body: bytes = request.state.body
        verified = alert_identity(body)
        receipt = await services.webhooks.accept(ALERT_SOURCE, verified, body, _trace(request))
        services.wake_rules()
        return _receipt(receipt.event_uuid, receipt.trace_id, receipt.duplicate)

    return router


def alert_identity(body: bytes) -> Verified:
    """What makes a notification one event, however often Alertmanager repeats it."""
    try:
        document = json.loads(body)
        status, alerts = document["status"], document["alerts"]
        rows = sorted(
            [str(a.get("fingerprint")), str(a.get("status")), str(a.get("startsAt"))]
            for a in alerts
        )
        key = json.dumps([document.get("groupKey"), status, rows])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MalformedError("the body is no notification of Alertmanager") from None
    if status not in ("firing", "resolved"):
        raise MalformedError("the status of a notification is firing or resolved")
    digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
    return Verified(digest, f"alert.{status}", "bearer")


def _json(text: bytes, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")


def _events(services: Services) -> APIRouter:
    router = APIRouter(tags=["events"])

    @router.get("/events", response_model=contract.Page[contract.WebhookEvent])
    async def events(
        source: Text = None,
        event_type: Text = None,
        processed: bool | None = None,
        cursor: Cursor = None,
        limit: Limit = 50,
    ) -> Response:
        """Events, the newest first; fewer than `limit` when their payloads are large."""
        which = EventFilter(source, event_type, processed)
        page = await services.tasks.list_events(which, cursor, limit)
        items = [contract.event_json(e) for e in page.items]
        return _json(contract.page_json(items, page.next_cursor))

    @router.get(
        "/events/{event_uuid}", response_model=contract.WebhookEvent, responses=_problem(404)
    )
    async def event(event_uuid: str) -> Response:
        """One event."""
        return _json(contract.event_json(await services.tasks.show_event(event_uuid)))

    @router.post(
        "/events/{event_uuid}/replay",
        status_code=202,
        response_model=contract.WebhookEvent,
        responses=_problem(404, 507),
    )
    async def replay_event(event_uuid: str) -> Response:
        """Have the rules see an event once more; a match becomes a new task."""
        found = await services.tasks.replay_event(event_uuid)
        return _json(contract.event_json(found), 202)

    return router


def _tasks(services: Services) -> APIRouter:
    router = APIRouter(tags=["tasks"])

    @router.post("/tasks", status_code=202, responses=_problem(507))
    async def submit(new: contract.NewTask, request: Request) -> contract.AgentTask:
        """Have a task done that no event asked for."""
        return contract.task_out(
            await services.tasks.submit(
                new.agent_type, new.prompt, new.project, new.priority, _trace(request)
            )
        )

    @router.get("/tasks")
    async def tasks(
        status: Status | None = None,
        agent_type: AgentType | None = None,
        project: Text = None,
        cursor: Cursor = None,
        limit: Limit = 50,
    ) -> contract.Page[contract.AgentTask]:
        """Tasks, the newest first."""
        which = TaskFilter(status, agent_type, project)
        page = await services.tasks.list(which, cursor, limit)
        items = [contract.task_out(t) for t in page.items]
        return contract.Page(items=items, next_cursor=page.next_cursor)

    @router.get("/tasks/{task_id}", responses=_problem(404))
    async def task(task_id: str) -> contract.AgentTask:
        """One task."""
        return contract.task_out(await services.tasks.show(task_id))

    return router


def _task(services: Services) -> APIRouter:
    router = APIRouter(tags=["tasks"])

    @router.post("/tasks/{task_id}/cancel", status_code=202, responses=_problem(404, 409, 507))
    async def cancel(task_id: str) -> contract.AgentTask:
        """End a task; all that it started ends with it."""
        return contract.task_out(await services.tasks.cancel(task_id))

    @router.post("/tasks/{task_id}/replay", status_code=202, responses=_problem(404, 409, 507))
    async def replay(task_id: str) -> contract.AgentTask:
        """Try a failed task anew."""
        return contract.task_out(await services.tasks.replay(task_id))

    @router.get(
        "/tasks/{task_id}/logs",
        response_class=Response,
        responses={
            200: {
                "description": "A piece of the output",
                "content": {"application/octet-stream": {}},
                "headers": {"X-Log-Size": {"schema": {"type": "integer"}}},
            },
            **_problem(404),
        },
    )
    async def logs(
        task_id: str,
        offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
        limit: Annotated[int, Query(ge=1, le=LOG_MOST)] = LOG_MOST,
    ) -> Response:
        """What the agent wrote, from `offset`; X-Log-Size says how much there is by now."""
        data, size = await services.tasks.logs(task_id, offset, limit)
        headers = {"X-Log-Size": str(size)}
        return Response(data, 200, headers, "application/octet-stream")

    return router


def _more(services: Services) -> APIRouter:
    router = APIRouter(tags=["observability"])

    @router.post("/metrics", status_code=204, response_class=Response, responses=_problem(507))
    async def push(batch: contract.MetricBatch) -> None:
        """Push measured values; Prometheus collects the last of each series."""
        await services.collect.push([contract.metric_in(m) for m in batch.metrics])

    @router.get("/traces/{trace_id}")
    async def trace(trace_id: str) -> contract.Page[contract.Span]:
        """The spans of a trace that are kept, the first 1,000 of them."""
        rows = await services.store.trace(trace_id)
        spans = [
            contract.Span(
                trace_id=r.trace_id, span_id=r.span_id, parent_id=r.parent_id, name=r.name,
                start=contract.moment(r.start_ns / 1e6),
                duration_ms=(r.end_ns - r.start_ns) / 1e6, ok=r.ok,
                attributes=json.loads(r.attributes),
            )
            for r in rows
        ]  # fmt: skip
        return contract.Page(items=spans)

    return router


def _operations(services: Services) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        """The process answers."""
        return Response("ok\n", media_type="text/plain")

    @router.get(
        "/readyz",
        response_model=contract.Ready,
        responses={503: {"model": contract.Ready, "description": "Not now"}},
    )
    async def readyz() -> Response:
        """Requests can be served."""
        reasons = services.faults()
        ready = contract.Ready(ready=not reasons, reasons=reasons)
        status = 503 if reasons else 200
        return Response(ready.model_dump_json(), status, media_type="application/json")

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """For Prometheus; from outside of the machine nobody gets here."""
        await services.collect.refresh()
        page, content_type = services.metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})

    return router
