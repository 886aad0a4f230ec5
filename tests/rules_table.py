"""The tables of docs/observability.md: every alert, recorded series, dashboard and panel.

python -m tests.rules_table     writes it anew
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ravectl import images
from tests import dashboards
from tests.plans import PLAN

PAGE = Path(__file__).resolve().parents[1] / "docs/observability.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def groups(name: str) -> list[dict[str, Any]]:
    text = images.render_debian(PLAN).file(f"etc/prometheus/{name}").content
    return list(yaml.safe_load(text)["groups"])


def table() -> str:
    """The table as it must be."""
    rows = [
        "| alert | severity | lasts | every | fires when | runbook |",
        "|---|---|---|---|---|---|",
    ]
    for group in groups("alerts.yml"):
        for rule in group["rules"]:
            name, page = rule["alert"], rule["annotations"]["runbook_url"].removeprefix("docs/")
            rows.append(
                f"| {name} | {rule['labels']['severity']} | {rule.get('for', '')} | "
                f"{group['interval']} | `{_line(rule['expr'])}` | [{name}]({page}) |"
            )
    rows += ["", "| recorded | every |", "|---|---|"]
    for group in groups("slo.yml"):
        for name in dict.fromkeys(_named(r) for r in group["rules"]):
            rows.append(f"| `{name}` | {group['interval']} |")
    return "\n".join([*rows, *_panels()]) + "\n"


def _panels() -> list[str]:
    """Each panel of each dashboard, and the metrics and recorded series that it asks for."""
    rows = ["", "| dashboard | panel | of |", "|---|---|---|"]
    names: dict[tuple[str, str], list[str]] = {}
    for asked in dashboards.asked():
        found = names.setdefault((asked.dashboard, asked.panel), [])
        store = " (VictoriaMetrics)" if asked.datasource == "rave-victoriametrics" else ""
        found += [f"`{m}`{store}" for m in dashboards.metrics(asked.expression)]
    titles = {
        uid: board["title"].removeprefix("RAVE: ") for uid, board in dashboards.load().items()
    }
    rows += [
        f"| {titles[uid]} | {panel} | {', '.join(dict.fromkeys(of))} |"
        for (uid, panel), of in names.items()
    ]
    return rows


def _line(expression: str) -> str:
    return re.sub(r"\s+", " ", expression).strip().replace("|", "\\|")


def _named(rule: dict[str, Any]) -> str:
    labels = "".join(f'{k}="{v}"' for k, v in rule.get("labels", {}).items())
    return f"{rule['record']}{{{labels}}}" if labels else str(rule["record"])


def written(page: str) -> str:
    """The page with its table made anew."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{table()}{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
