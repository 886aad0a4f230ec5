"""Log lines as JSON, one per line, to the journal; each with its trace's id."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
import traceback

current_trace: contextvars.ContextVar[str | None] = contextvars.ContextVar("trace", default=None)
# what the journal reads at a line's beginning (sd-daemon(3))
_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


class JsonFormatter(logging.Formatter):
    """A record as an object. Of an exception only its kind and place: its text may quote data."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        row: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if trace := current_trace.get():
            row["trace_id"] = trace
        row |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            row["exception"] = where(record.exc_info[1])
        line = json.dumps(row, ensure_ascii=False, default=str)
        return f"<{_PRIORITY.get(record.levelname, 6)}>{line}" if self._journal else line


def where(error: BaseException) -> str:
    """An exception's kind and place."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def configure(*, journal: bool, level: int = logging.INFO) -> None:
    """Send every logger's lines to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(journal=journal))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("rave").setLevel(level)


class JsonLog:
    """The log port."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("rave")

    def info(self, message: str, **fields: object) -> None:
        """Something that went as it should."""
        self._logger.info(message, extra={"fields": fields})

    def warning(self, message: str, **fields: object) -> None:
        """Something that somebody should look at."""
        self._logger.warning(message, extra={"fields": fields})

    def error(self, message: str, **fields: object) -> None:
        """Something that somebody must look at."""
        self._logger.error(message, extra={"fields": fields})
