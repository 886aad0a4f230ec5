"""Asks Prometheus, on loopback, for what the console shows."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

ANSWER_BYTES = 4 * 2**20  # more than any panel needs
SILENT_SECONDS = 2.5  # between two bytes of an answer: a little more than a query may take
ALL_SECONDS = 8.0  # for all the questions of one call


class PrometheusError(Exception):
    """There is no answer; the text is for people."""


class Prometheus:
    """A Prometheus server at `url` (http://HOST:PORT). Blocks: call it in a thread."""

    def __init__(self, url: str) -> None:
        self._address = urllib.parse.urlsplit(url).netloc

    def ask(self, paths: Sequence[str]) -> list[Any | PrometheusError]:
        """The answer (JSON) to each GET, over one connection; or why there is none.

        When it cannot be reached, or time is up, the rest is not tried.
        """
        end = time.monotonic() + ALL_SECONDS
        connection = http.client.HTTPConnection(self._address, timeout=SILENT_SECONDS)
        found: list[Any | PrometheusError] = []
        try:
            for path in paths:
                if time.monotonic() > end:
                    raise TimeoutError
                found.append(_ask(connection, path))
        except (OSError, http.client.HTTPException) as e:
            late = isinstance(e, TimeoutError)
            why = "does not answer in time" if late else "cannot be reached"
            lost = PrometheusError(f"Prometheus {why}")
            found += [lost] * (len(paths) - len(found))
        finally:
            connection.close()
        return found


def _ask(connection: http.client.HTTPConnection, path: str) -> Any | PrometheusError:
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read(ANSWER_BYTES + 1)
    if len(body) > ANSWER_BYTES:
        connection.close()  # what else comes is not read
        return PrometheusError("Prometheus says more than can be shown")
    try:
        answer = json.loads(body)
        if answer["status"] == "success":
            return answer
        return PrometheusError(f"Prometheus refused the query: {answer.get('error', '')}"[:200])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return PrometheusError(f"Prometheus answered {response.status}")
