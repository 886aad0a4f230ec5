"""A Report as a person or a program reads it."""

from __future__ import annotations

import enum
import io
import json
import platform
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib import resources

from ravectl import __version__
from ravectl.model import CheckResult, Outcome, Report, to_json

_MARK = {Outcome.PASSED: "passed", Outcome.FAILED: "FAILED", Outcome.ERROR: "ERROR"}
_COLOUR = {Outcome.PASSED: "green", Outcome.FAILED: "bold red", Outcome.ERROR: "bold yellow"}
# what XML 1.0 can hold (its section 2.2)
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Format(enum.StrEnum):
    """How a report is written."""

    TABLE = "table"
    JSON = "json"
    JUNIT = "junit"
    MARKDOWN = "markdown"


def schema() -> str:
    """The JSON Schema (draft 2020-12) of a report as JSON."""
    return (resources.files("ravectl.verify") / "report.schema.json").read_text()


def changes(before: Report | None, report: Report) -> tuple[CheckResult, ...]:
    """What another verification found that the one before had not; all of it when there is none.

    A check that failed and fails in another way has changed; figures of one that passes have not.
    """
    known = {r.id: r for r in before.results} if before else {}

    def key(r: CheckResult) -> tuple[Outcome, str]:
        return r.outcome, "" if r.outcome is Outcome.PASSED else r.seen

    return tuple(r for r in report.results if r.id not in known or key(known[r.id]) != key(r))


def lines(results: Sequence[CheckResult], started: str) -> list[str]:
    """Results as lines for a log, each with the time of its verification."""
    found = []
    for r in results:
        found.append(f"{started}  {r.id:<3} {_MARK[r.outcome]:<6} {r.title}")
        found += [f"{started}      {text}" for text in _why(r)]
    return found


def render(
    report: Report, fmt: Format | str = Format.TABLE, *, terminal: bool = False, width: int = 100
) -> str:
    """The report as text that ends with a newline.

    A table is drawn and coloured for a `terminal` of `width` columns, else plain lines.
    """
    match Format(fmt):
        case Format.JSON:
            return json.dumps({"holds": report.holds, **to_json(report)}, indent=2) + "\n"
        case Format.JUNIT:
            return _junit(report)
        case Format.MARKDOWN:
            return _markdown(report)
        case Format.TABLE:
            return _rich(report, width) if terminal else _plain(report)


def summary(report: Report) -> str:
    """One line: how many checks held, of what, in which time."""
    count = {o: sum(r.outcome is o for r in report.results) for o in Outcome}
    parts = [f"{count[Outcome.PASSED]} of {len(report.results)} checks hold"]
    if count[Outcome.FAILED]:
        parts.append(f"{count[Outcome.FAILED]} failed")
    if count[Outcome.ERROR]:
        parts.append(f"{count[Outcome.ERROR]} could not be run")
    return f"{', '.join(parts)} ({report.seconds:.1f} s)"


def _subject(report: Report) -> str:
    return f"{report.instance}, profile {report.profile}, image {report.image[:12]}"


def _plain(report: Report) -> str:
    width = max((len(r.title) for r in report.results), default=0)
    lines = []
    for r in report.results:
        line = f"{r.id:<3} {_MARK[r.outcome]:<6} {r.seconds:5.1f} s  {r.title:<{width}}"
        lines.append(f"{line}  {r.seen}" if r.outcome is Outcome.PASSED else line.rstrip())
        lines += [f"    {text}" for text in _why(r)]
    return "\n".join([*lines, "", f"{summary(report)}: {_subject(report)}"]) + "\n"


def _why(r: CheckResult) -> Sequence[str]:
    if r.outcome is Outcome.PASSED:
        return ()
    rows = (("expected", r.expected), ("seen", r.seen), ("fix", r.remedy))
    return [f"{name + ':':<9} {text}" for name, text in rows if text]


def _rich(report: Report, width: int) -> str:
    # here and not above: Rich takes 60 ms to import, which other commands need not pay
    from rich import box  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=_subject(report), box=box.SIMPLE, title_justify="left")
    for name, justify in (("check", "left"), ("", "left"), ("time", "right"), ("", "left")):
        table.add_column(
            name, justify="right" if justify == "right" else "left", no_wrap=name != ""
        )
    for r in report.results:
        body = Text(r.title, style="bold")
        if r.outcome is Outcome.PASSED:
            body.append(f"\n{r.seen}", style="dim")
        for line in _why(r):
            body.append(f"\n{line}", style="not bold")
        mark = Text(_MARK[r.outcome], style=_COLOUR[r.outcome])
        table.add_row(r.id, mark, f"{r.seconds:.1f} s", body)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    console.print(table)
    console.print(Text(summary(report), style="green" if report.holds else "bold red"))
    return out.getvalue()


def _junit(report: Report) -> str:
    suites = list(dict.fromkeys(r.suite for r in report.results))
    root = ET.Element("testsuites", {"name": "ravectl verify", **_counts(report.results)})
    root.set("time", f"{report.seconds:.3f}")
    for suite in suites:
        mine = [r for r in report.results if r.suite is suite]
        node = ET.SubElement(root, "testsuite", {"name": suite.value, **_counts(mine)})
        node.set("time", f"{sum(r.seconds for r in mine):.3f}")
        node.set("timestamp", report.started.removesuffix("Z"))  # the schema knows no zone
        node.set("hostname", _xml(platform.node()) or "localhost")
        known = ET.SubElement(node, "properties")
        for name in ("instance", "profile", "image"):
            ET.SubElement(known, "property", name=name, value=_xml(str(getattr(report, name))))
        for r in mine:
            _testcase(node, r)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counts(results: Sequence[CheckResult]) -> dict[str, str]:
    return {
        "tests": str(len(results)),
        "failures": str(sum(r.outcome is Outcome.FAILED for r in results)),
        "errors": str(sum(r.outcome is Outcome.ERROR for r in results)),
    }


def _testcase(parent: ET.Element, r: CheckResult) -> None:
    name = _xml(f"{r.id} {r.title}")
    case = ET.SubElement(
        parent, "testcase", classname=r.suite.value, name=name, time=f"{r.seconds:.3f}"
    )
    if r.outcome is Outcome.PASSED:
        ET.SubElement(case, "system-out").text = _xml(r.seen)
        return
    kind = "failure" if r.outcome is Outcome.FAILED else "error"
    ET.SubElement(case, kind, message=_xml(r.seen), type=r.id).text = _xml("\n".join(_why(r)))


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def _markdown(report: Report) -> str:
    lines = [
        f"## {_cell(summary(report))}",
        "",
        f"- machine: {_cell(report.instance)}, profile {_cell(report.profile)}",
        f"- image: {_cell(report.image) or 'not known'}",
        f"- started: {_cell(report.started)}, took {report.seconds:.1f} s",
        f"- asked from: {_cell(platform.node())}, ravectl {__version__}",
        f"- not checked: {', '.join(report.not_checked) or 'nothing, every check was run'}",
        "",
        "| check | outcome | time | what | seen |",
        "|---|---|---|---|---|",
    ]
    for r in report.results:
        what, seen = _cell(r.title), _cell(r.seen)
        lines.append(f"| {r.id} | {_MARK[r.outcome]} | {r.seconds:.1f} s | {what} | {seen} |")
    broken = [r for r in report.results if r.outcome is not Outcome.PASSED]
    for r in broken:
        lines += ["", f"**{r.id}: {_cell(r.title)}**", ""]
        lines += [f"- {_cell(text)}" for text in _why(r)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that Markdown takes as text, also inside a table."""
    escaped = re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
    return re.sub(r"\s+", " ", escaped)
