"""Errors as problem+json (RFC 9457), each with its trace's id, none with a traceback."""

from __future__ import annotations

import json
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rave_dispatcher.adapters.logs import current_trace
from rave_dispatcher.application.errors import DispatcherError, UnauthenticatedError

MEDIA_TYPE = "application/problem+json"
_SLUGS = {400: "malformed", 404: "not-found", 405: "method-not-allowed"}


def body(status: int, slug: str, title: str, detail: str, **more: object) -> bytes:
    """A problem's JSON."""
    document = {
        "type": f"urn:rave:problem:{slug}", "title": title, "status": status, "detail": detail,
        "trace_id": current_trace.get() or "", **more,
    }  # fmt: skip
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


def response(
    status: int, slug: str, title: str, detail: str,
    headers: Mapping[str, str] | None = None, **more: object,
) -> Response:  # fmt: skip
    """A problem as an answer."""
    return Response(
        body(status, slug, title, detail, **more), status, dict(headers or {}), MEDIA_TYPE
    )


def of_error(e: DispatcherError) -> Response:
    """The answer to a refused request."""
    headers = dict(e.headers)
    if isinstance(e, UnauthenticatedError):
        headers.setdefault("WWW-Authenticate", 'Bearer realm="rave-dispatcher"')
    if e.status in (503, 507):
        headers.setdefault("Retry-After", "30")
    return response(e.status, e.slug, e.title, e.detail, headers)


def install(app: FastAPI) -> None:
    """Have all errors answered so."""

    async def refused(_: Request, e: Exception) -> Response:
        assert isinstance(e, DispatcherError)
        return of_error(e)

    async def invalid(_: Request, e: Exception) -> Response:
        assert isinstance(e, RequestValidationError)
        # where and why; not the input, which may be anything
        errors = [{"loc": [str(p) for p in r["loc"]], "msg": r["msg"]} for r in e.errors()[:20]]
        return response(
            422, "invalid", "The content is not valid", f"{len(e.errors())} faults", errors=errors
        )

    async def http(_: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        slug = _SLUGS.get(e.status_code, "http-error")
        return response(e.status_code, slug, str(e.detail), str(e.detail), e.headers)

    app.add_exception_handler(DispatcherError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
