"""Rules: which event becomes which task. The first rule that matches an event decides.

A rule names sources and types (with * as in file names), conditions on the payload by
JSONPath (RFC 9535), who does the task, and a template for its prompt in which {{ $.path }}
stands for what the payload has there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jsonpath

from rave_dispatcher.domain.tasks import DEFAULT_PRIORITY, AgentType

MAX_PROMPT = 64 * 1024
MAX_NAME = 80
_PLACE = re.compile(r"\{\{\s*(\$.*?)\s*\}\}", re.S)
_NOTHING = object()


class RuleError(ValueError):
    """A rule that can never work; the text says which part of it."""


@dataclass(frozen=True)
class Condition:
    """What the payload must have at a place.

    With `equals`, some value there is that one; with `matches`, some text there has that
    regular expression in it; with neither, there is a value at all. `negate` turns it round.
    """

    path: str
    equals: Any = None
    matches: str | None = None
    negate: bool = False
    has_equals: bool = False

    def __post_init__(self) -> None:
        compile_path(self.path)
        if self.has_equals and self.matches is not None:
            raise RuleError(f"condition on {self.path}: give equals or matches, not both")
        if self.matches is not None:
            try:
                re.compile(self.matches)
            except (re.error, OverflowError, RecursionError) as e:
                raise RuleError(f"condition on {self.path}: {self.matches!r}: {e}") from None

    def holds(self, payload: Any) -> bool:
        """Whether the payload is as the condition says."""
        found = values(self.path, payload)
        if self.has_equals:
            ok = any(_same(value, self.equals) for value in found)
        elif self.matches is not None:
            pattern = re.compile(self.matches)
            ok = any(isinstance(v, str) and pattern.search(v[:MAX_PROMPT]) for v in found)
        else:
            ok = next(found, _NOTHING) is not _NOTHING
        return ok is not self.negate


@dataclass(frozen=True)
class Rule:
    """What becomes of events that match."""

    name: str
    agent_type: AgentType
    prompt: str
    sources: tuple[str, ...] = ("*",)
    types: tuple[str, ...] = ("*",)
    conditions: tuple[Condition, ...] = ()
    priority: int = DEFAULT_PRIORITY
    max_attempts: int | None = None
    places: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        places = tuple(_PLACE.findall(self.prompt))
        for place in places:
            compile_path(place)
        object.__setattr__(self, "places", places)

    def concerns(self, source: str, event_type: str) -> bool:
        """Whether it is about such events; nothing of the payload is needed to know."""
        return _any_glob(self.sources, source) and _any_glob(self.types, event_type)

    def matches(self, payload: Any) -> bool:
        """Whether all its conditions hold."""
        return all(c.holds(payload) for c in self.conditions)

    def render(self, payload: Any) -> str:
        """The prompt for an event."""
        text = _PLACE.sub(lambda m: _text(values(m[1], payload)), self.prompt)
        return text[:MAX_PROMPT]


def concerned(rules: Iterable[Rule], source: str, event_type: str) -> list[Rule]:
    """The rules that are about such events, in their order."""
    return [r for r in rules if r.concerns(source, event_type)]


def first_match(rules: Iterable[Rule], payload: Any) -> Rule | None:
    """The rule that decides what becomes of an event."""
    return next((r for r in rules if r.matches(payload)), None)


def compile_path(path: str) -> None:
    """Raise RuleError unless `path` is a JSONPath expression."""
    try:
        _compiled(path)
    except jsonpath.JSONPathError as e:
        raise RuleError(f"{path!r} is not a JSONPath: {str(e).splitlines()[0]}") from None
    except (OverflowError, RecursionError) as e:
        raise RuleError(f"{path!r} is more than can be read: {e}") from None


def values(path: str, payload: Any) -> Iterator[Any]:
    """The values at a place of a payload; none for a filter that does not suit the payload.

    One after the other: a sender can write a payload that has millions of them.
    """
    with contextlib.suppress(jsonpath.JSONPathError, RecursionError):
        for match in _compiled(path).finditer(payload):
            yield match.obj


_cache: dict[str, Any] = {}


def _compiled(path: str) -> Any:
    # rules are few and fixed by the configuration
    if path not in _cache:
        _cache[path] = jsonpath.compile(path)
    return _cache[path]


def _any_glob(patterns: tuple[str, ...], name: str) -> bool:
    return any(p == "*" or fnmatch.fnmatchcase(name, p) for p in patterns)


def _same(value: Any, wanted: Any) -> bool:
    # True == 1 in Python, and is not so in JSON
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def _text(found: Iterable[Any]) -> str:
    parts: list[str] = []
    size = 0
    for v in found:
        parts.append(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False))
        size += len(parts[-1])
        if size > MAX_PROMPT:  # what follows is cut off anyway
            break
    return ", ".join(parts)
