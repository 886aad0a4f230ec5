"""Verbs that judge: verify a machine, doctor this host."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ravectl import console
from ravectl.cli import options
from ravectl.errors import EXIT_CHECK, EXIT_HOST, RavectlError, UsageError

if TYPE_CHECKING:
    from ravectl.instance import Instance
    from ravectl.model import CheckResult, Report, Suite


def verify(
    suite: Annotated[
        list[str] | None, typer.Option("--suite", "-s", help="Only this suite; may be repeated.")
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option("--check", "-c", help="Only this check, as H3; repeatable.")
    ] = None,
    disruptive: Annotated[
        bool, typer.Option("--disruptive", help="Also the checks that stop or restart things.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", "-f", help="table, json, junit or markdown.")
    ] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the report to this file.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Write JUnit XML to this file, too.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write a Markdown report, too.")
    ] = None,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="ID", help="Say what a check does and why.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Again and again, printing changes, to Ctrl-C.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=1, help="Seconds between two, with --watch.")
    ] = 60.0,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of --json.")
    ] = False,
    as_json: options.AsJson = False,
    name: options.Name = options.DEFAULT_NAME,
    workspace: options.Folder = None,
) -> None:
    """Hold the running machine against what it was built from (exit 3 when it does not hold)."""
    from ravectl import verify as verification

    if explain is not None:
        sys.stdout.write(verification.explain(explain))
        return
    if schema:
        sys.stdout.write(verification.schema())
        return
    options.require_seconds(interval, "--interval")
    fmt = _format("json" if as_json else form)
    found = options.find_instance(workspace, name)
    if watch:
        if disruptive or junit or markdown or output or fmt not in ("table", "json"):
            raise UsageError(
                "--watch prints changes only, of checks that disturb nothing",
                "give it with --suite, --check, --interval and --json alone",
            )
        _watch(found, _suites(suite), set(check) if check else None, interval, fmt == "json")
    _check_writable([p for p in (output, junit, markdown) if p is not None])
    report = _report(found, _suites(suite), set(check) if check else None, disruptive)
    _hand_out(report, fmt, output, {"junit": junit, "markdown": markdown})
    if not report.holds:
        raise typer.Exit(EXIT_CHECK)


def _check_writable(paths: list[Path]) -> None:
    """Before a minute of verification, say where its report cannot go."""
    if len({os.path.realpath(p) for p in paths}) < len(paths):
        raise UsageError("two reports go to one file", "name a file for each")
    for path in paths:
        there = path.exists() and not path.is_file()  # a device or a pipe, which is written to
        folder = Path(os.path.realpath(path)).parent
        if path.is_dir() or not os.access(path if there else folder, os.W_OK):
            raise UsageError(f"{str(path)!r} cannot be written", "name a file in a folder of yours")


def _hand_out(report: Report, fmt: str, output: Path | None, also: dict[str, Path | None]) -> None:
    """Print the report or write it to `output`, and to files in other formats."""
    from ravectl import files
    from ravectl import verify as verification

    for form, path in also.items():
        if path is not None:
            files.write_out(path, verification.render(report, form))
    terminal = output is None and sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns
    text = verification.render(report, fmt, terminal=terminal, width=width)
    if output is None:
        sys.stdout.write(text)
    else:
        files.write_out(output, text)
    if output is not None or fmt not in ("table", "markdown"):
        console.note(verification.summary(report))  # the others say it themselves


def _format(name: str) -> str:
    from ravectl.verify import Format

    known = [f.value for f in Format]
    if name not in known:
        raise UsageError(f"there is no format {name!r}", f"use one of: {', '.join(known)}")
    return name


def _suites(names: list[str] | None) -> set[Suite] | None:
    from ravectl.model import Suite

    if not names:
        return None
    known = [s.value for s in Suite]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no suite {name!r}", f"use one of: {', '.join(known)}")
    return {Suite(n) for n in names}


def _report(
    found: Instance, suites: set[Suite] | None, ids: set[str] | None, disruptive: bool
) -> Report:
    from ravectl import lifecycle
    from ravectl import verify as verification

    verification.select(suites, ids, disruptive=disruptive)  # before a connection is made
    with console.step("verifying") as step, lifecycle.verify_target(found) as target:
        done = 0

        def count(result: CheckResult) -> None:
            nonlocal done
            done += 1
            step.update(f"{done} done, last {result.id} {result.outcome.value}")

        return verification.run(target, suites, ids, count, disruptive=disruptive)


def _watch(
    found: Instance, suites: set[Suite] | None, ids: set[str] | None, interval: float, as_json: bool
) -> NoReturn:
    """Verify until Ctrl-C; then exit 3 when the last verification did not hold, else 0."""
    from ravectl import lifecycle, reconnect, ssh
    from ravectl import verify as verification
    from ravectl.model import to_json

    if any(c.disruptive for c in verification.select(suites, ids)):
        raise UsageError("a disruptive check is not repeated", "leave it out of --check")
    reconnect.check_running(found)
    last: Report | None = None

    def once(connection: ssh.Connection, worked: Callable[[], None]) -> None:
        nonlocal last
        report = verification.run(lifecycle.target_over(found, connection), suites, ids)
        if not connection.alive:  # its errors are the connection's, not the machine's
            raise ConnectionError("the SSH connection is gone")
        worked()
        news = verification.changes(last, report)
        with reconnect.output():
            if as_json:
                about = {"instance": found.name, "time": report.started}
                for r in news:
                    print(json.dumps(about | to_json(r)))
            elif news:
                print("\n".join(verification.lines(news, report.started)))
            sys.stdout.flush()
        last = report
        time.sleep(interval)

    try:
        reconnect.stay(found, once, options.say_lost)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_CHECK if last is not None and not last.holds else 0) from None


def doctor(as_json: options.AsJson = False) -> None:
    """Show what ravectl needs on this host and the command that mends what is missing."""
    from ravectl import doctor as examination

    found = examination.examine()
    if as_json:
        options.print_json(found)
    else:
        for row in found:
            mark = "ok     " if row.found else ("MISSING" if row.needed else "absent ")
            print(f"{mark}  {row.name:<22} {row.seen}")
            if not row.found and row.remedy:
                print(f"{'':9}fix: {row.remedy}")
    missing = examination.missing(found)
    if missing:
        names = ", ".join(r.name for r in missing)
        console.error(RavectlError(f"this host lacks {names}", "run the commands above"))
        raise typer.Exit(EXIT_HOST)
