"""The dispatcher of a running machine, from outside: its API through the ingress.

The two share nothing but that API; its description is docs/api/openapi.json.
"""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from ravectl import sops, vault
from ravectl.errors import RavectlError, UsageError
from ravectl.instance import Instance
from ravectl.model import InstanceState
from ravectl.verify import web

SECONDS = 60.0
TOKEN = "dispatcher/api-token"  # noqa: S105 - a secret's name
PREFIX = "/api/v1"
PAGE = 100


class UnreachableError(RavectlError):
    """The dispatcher does not answer now, and may do so later."""


class Api:
    """A connection to the API; use as a context manager. Raises RavectlError for all that fails."""

    def __init__(self, port: int, ca_cert: Path, token: str, seconds: float = SECONDS) -> None:
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        deadline = time.monotonic() + seconds
        self._client = web.Client(port, web.DEFAULT_HOST, web.trusting(ca_cert), deadline)

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.__exit__(*exception)

    def get(self, path: str, query: Mapping[str, str | None] | None = None) -> Any:
        """What is at a path."""
        return _document(self._ask("GET", _with_query(path, query)))

    def post(self, path: str, document: Any = None) -> Any:
        """Have something done."""
        return _document(self._ask("POST", path, document))

    def output(self, task_id: str, offset: int) -> tuple[bytes, int]:
        """A piece of what an agent wrote, and how much there is by now."""
        answer = self._ask("GET", f"/tasks/{quoted(task_id)}/logs?offset={offset}")
        size = answer.headers.get("x-log-size", "0")
        return answer.body, int(size) if size.isdigit() else 0

    def items(
        self, path: str, query: Mapping[str, str | None], most: int, page_size: int = PAGE
    ) -> Iterator[Any]:
        """The first rows of a list, over as many pages as that takes."""
        cursor = None
        while most > 0:
            limit = str(min(most, page_size))
            page = self.get(path, {**query, "cursor": cursor, "limit": limit})
            try:
                rows, cursor = page["items"], page["next_cursor"]
                yield from rows
                most -= len(rows)
            except (KeyError, TypeError):
                raise RavectlError("the dispatcher's answer is not a list", _LOGS) from None
            if cursor is None:
                return

    def _ask(self, method: str, path: str, document: Any = None) -> web.Answer:
        headers = dict(self._headers)
        try:
            if method == "GET":
                answer = self._client.get(PREFIX + path, headers)
            else:
                body = b"" if document is None else json.dumps(document).encode()
                if body:
                    headers["Content-Type"] = "application/json"
                answer = self._client.post(PREFIX + path, body, headers)
        except OSError as e:
            raise UnreachableError(
                f"the machine's dispatcher does not answer: {web.explain(e)}",
                "see what it is at: ravectl status, ravectl logs dispatcher",
            ) from None
        if answer.status >= 300:
            raise refusal(answer)
        return answer


_LOGS = "see what it did: ravectl logs dispatcher"
_REMEDIES = {
    401: "the token is not the machine's: ravectl secrets deliver",
    404: "see what there is: ravectl task list, ravectl event list",
    409: "look at its state: ravectl task show",
    507: "make room on the machine's disk: ravectl ssh -- df -h",
}


# by the ingress while the dispatcher starts, by the dispatcher when too much is asked or the
# token was rotated: whoever connects anew reads today's
_LATER = (
    HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)  # fmt: skip


def refusal(answer: web.Answer) -> RavectlError:
    """What an answer that is none says, for a person (problem+json, RFC 9457)."""
    try:
        problem = json.loads(answer.body)
        title, detail = str(problem["title"]), str(problem["detail"])
        errors = problem.get("errors") or []
        more = [f"{'.'.join(e['loc'][1:])}: {e['msg']}" for e in errors]
        trace = f"\ntrace {problem['trace_id']}" if problem.get("trace_id") else ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if answer.status == HTTPStatus.NOT_FOUND:  # by the ingress, which knows no such route
            return RavectlError(
                "this machine has no dispatcher",
                "its image is without one: docs/dispatcher.md says where that stands",
            )
        title, detail, more, trace = f"status {answer.status}", "no reason was given", [], ""
    message = f"the dispatcher refused: {title.lower()}: {'; '.join(more) or detail}"
    kind: type[RavectlError] = UsageError if answer.status in (404, 422) else RavectlError
    if answer.status in _LATER:
        kind = UnreachableError
    return kind(message, _REMEDIES.get(answer.status, _LOGS), details=trace.strip())


def quoted(text: str) -> str:
    """An id as a part of a path."""
    return urllib.parse.quote(text, safe="")


def _with_query(path: str, query: Mapping[str, str | None] | None) -> str:
    given = {k: v for k, v in (query or {}).items() if v is not None}
    return f"{path}?{urllib.parse.urlencode(given)}" if given else path


def _document(answer: web.Answer) -> Any:
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        raise RavectlError("the dispatcher's answer is not JSON", _LOGS) from None


def of_instance(found: Instance, identity: sops.Identity) -> Api:
    """The API of a running machine, with the token from the workspace's secrets."""
    if found.state() is not InstanceState.RUNNING:
        flag = "" if found.name == "default" else f" --name {found.name}"
        raise UnreachableError(
            f"instance {found.name!r} does not run", f"start it: ravectl up{flag}"
        )
    shared = vault.read(found.places.shared, identity)
    token = shared.values.get(TOKEN)
    if token is None:
        raise RavectlError(f"there is no secret {TOKEN}", "make it: ravectl rotate-secrets")
    return Api(found.endpoint().https_port, found.places.ca_cert, token)
