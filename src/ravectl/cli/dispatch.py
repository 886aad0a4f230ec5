"""Verbs of the dispatcher: event list|show|replay, task submit|list|show|cancel|replay|logs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ravectl.cli import options
from ravectl.errors import EXIT_FAILED, UsageError

if TYPE_CHECKING:
    from ravectl.dispatcher import Api

event_app = typer.Typer(no_args_is_help=True, help="What came in: list, show, replay.")
task_app = typer.Typer(no_args_is_help=True, help="What agents do: submit, list, show, cancel.")

AGENT_TYPES = ("backend-architect", "frontend-developer", "ai-engineer")
STATES = ("pending", "running", "completed", "failed")
POLL_SECONDS = 1.0

Most = Annotated[int, typer.Option("--limit", help="How many of the newest.", min=1)]
EventId = Annotated[str, typer.Argument(help="The event's UUID, as event list shows it.")]
TaskId = Annotated[str, typer.Argument(help="The task's id, as task list shows it.")]


def _api(name: str, workspace: Path | None) -> Api:
    from ravectl import dispatcher

    found = options.find_instance(workspace, name)
    return dispatcher.of_instance(found, options.opener(found.workspace))


def _path(kind: str, name: str, verb: str = "") -> str:
    from ravectl.dispatcher import quoted

    return f"/{kind}/{quoted(name)}" + (f"/{verb}" if verb else "")


def _print(document: Any) -> None:
    from ravectl.verify.framework import clean

    print(clean(document) if isinstance(document, str) else json.dumps(document, indent=2))


def _rows(rows: list[dict[str, Any]], columns: tuple[tuple[str, int], ...]) -> None:
    from ravectl.verify.framework import clean

    for row in rows:
        # what senders wrote may hold escape sequences
        cells = [clean(str(row.get(key) or "-")).ljust(width) for key, width in columns]
        print("  ".join(cells).rstrip())


# --- events ----------------------------------------------------------------------------------


@event_app.command("list")
def list_events(
    source: Annotated[str | None, typer.Option(help="Only of this sender, such as gitlab.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only of this type.")] = None,
    limit: Most = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Then each as it comes, until Ctrl-C.")
    ] = False,
    as_json: options.AsJson = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show the newest events, the newest first; with --follow the newest last, as they come."""
    query = {"source": source, "event_type": kind}
    if follow:
        _follow(query, limit, name, workspace, as_json=as_json)
        return
    with _api(name, workspace) as api:
        rows = list(api.items("/events", query, limit))
    if as_json:
        _print(rows)
        return
    columns = (
        ("event_uuid", 36), ("timestamp", 27), ("source", 12), ("event_type", 24), ("project", 24),
        ("task_id", 36),
    )  # fmt: skip
    _rows(rows, columns)


def _follow(
    query: dict[str, str | None], limit: int, name: str, workspace: Path | None, *, as_json: bool
) -> None:
    from ravectl import feed

    columns = (
        ("timestamp", 27), ("source", 12), ("event_type", 24), ("trace_id", 32),
        ("event_uuid", 36), ("project", 24), ("task_id", 0),
    )  # fmt: skip

    def put(row: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(row))
        else:
            _rows([row], columns)
        sys.stdout.flush()

    with options.until_interrupted():
        feed.follow(lambda: _api(name, workspace), query, limit, put, options.say_lost)


@event_app.command("show")
def show_event(
    event: EventId,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show one event with its payload, as JSON."""
    with _api(name, workspace) as api:
        _print(api.get(_path("events", event)))


@event_app.command("replay")
def replay_event(
    event: EventId,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Have the rules see an event once more; a match becomes a new task."""
    with _api(name, workspace) as api:
        _print(api.post(_path("events", event, "replay"))["event_uuid"])


# --- tasks -----------------------------------------------------------------------------------


@task_app.command("submit")
def submit_task(
    prompt: Annotated[str, typer.Argument(help="What to do; - reads it from standard input.")],
    agent: Annotated[
        str, typer.Option("--agent", "-a", help=f"One of: {', '.join(AGENT_TYPES)}.")
    ] = AGENT_TYPES[0],
    project: Annotated[str | None, typer.Option(help="Projects take turns.")] = None,
    priority: Annotated[int, typer.Option(min=0, max=9, help="9 goes first.")] = 5,
    wait: Annotated[
        float | None, typer.Option(help="Seconds to wait for its end; exit 1 if it failed.")
    ] = None,
    as_json: options.AsJson = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Give an agent a task and print the task's id."""
    _one_of(agent, AGENT_TYPES, "agent type")
    text = sys.stdin.read() if prompt == "-" else prompt
    document = {"agent_type": agent, "prompt": text, "priority": priority}
    if project is not None:
        document["project"] = project
    with _api(name, workspace) as api:
        task = api.post("/tasks", document)
    if wait is not None:
        task = _wait(task["task_id"], wait, name, workspace)
    _print(task if as_json else task["task_id"])
    if wait is not None and task["status"] != "completed":
        raise typer.Exit(EXIT_FAILED)


def _wait(task_id: str, seconds: float, name: str, workspace: Path | None) -> Any:
    end = time.monotonic() + seconds
    while True:
        with _api(name, workspace) as api:
            task = api.get(_path("tasks", task_id))
        if task["status"] in ("completed", "failed") or time.monotonic() > end:
            return task
        time.sleep(POLL_SECONDS)


@task_app.command("list")
def list_tasks(
    state: Annotated[str | None, typer.Option("--status", help=f"{', '.join(STATES)}.")] = None,
    agent: Annotated[str | None, typer.Option("--agent", help="Only of this type.")] = None,
    project: Annotated[str | None, typer.Option(help="Only of this project.")] = None,
    limit: Most = 20,
    as_json: options.AsJson = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show the newest tasks."""
    if state is not None:
        _one_of(state, STATES, "status")
    if agent is not None:
        _one_of(agent, AGENT_TYPES, "agent type")
    query = {"status": state, "agent_type": agent, "project": project}
    with _api(name, workspace) as api:
        rows = list(api.items("/tasks", query, limit))
    if as_json:
        _print(rows)
        return
    columns = (
        ("task_id", 36), ("created_at", 27), ("status", 9), ("outcome", 13), ("agent_type", 18),
        ("project", 24),
    )  # fmt: skip
    _rows(rows, columns)


def _one_of(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise UsageError(f"there is no {what} {value!r}", f"use one of: {', '.join(known)}")


@task_app.command("show")
def show_task(
    task: TaskId,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Show one task with what it used, as JSON."""
    with _api(name, workspace) as api:
        _print(api.get(_path("tasks", task)))


@task_app.command("cancel")
def cancel_task(
    task: TaskId,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """End a task; all that it started ends with it."""
    with _api(name, workspace) as api:
        found = api.post(_path("tasks", task, "cancel"))
    _print("stopping" if found["cancel_requested"] else found["status"])


@task_app.command("replay")
def replay_task(
    task: TaskId,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Try a failed task anew."""
    with _api(name, workspace) as api:
        _print(api.post(_path("tasks", task, "replay"))["status"])


@task_app.command("logs")
def task_logs(
    task: TaskId,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Print what the agent wrote."""
    with _api(name, workspace) as api:
        offset, size = 0, 1
        while offset < size:
            data, size = api.output(task, offset)
            sys.stdout.buffer.write(data)
            offset += len(data)
            if not data:
                break
    sys.stdout.buffer.flush()
