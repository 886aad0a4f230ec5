"""The table of docs/observability.md: every alert and recorded series of the rendered rules.

python -m tests.rules_table     writes it anew
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ravectl import images
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
    return "\n".join(rows) + "\n"


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
