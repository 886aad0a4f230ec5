"""The shipped dashboards, as tests and the docs read them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ravectl import files
from tests.monitored import Query

FOLDER = files.find_data("templates") / "common" / "dashboards"
PORTS = {"rave-prometheus": 9090, "rave-victoriametrics": 8428}
# Grafana gives four times what is collected least often, or the step if that is more
RATE_INTERVAL = "1m"
# queries for which to return nothing is the good state
SILENT = {
    'ALERTS{alertstate="firing"}': "nothing fires on a machine that is well",
    'ALERTS{alertstate="firing", severity="critical"}': "nothing fires on a machine that is well",
}


@dataclass(frozen=True)
class Asked:
    """A query of a panel, or of what a dashboard marks on all of its panels."""

    dashboard: str
    panel: str
    datasource: str  # uid
    expression: str

    @property
    def query(self) -> Query:
        """As Grafana sends it."""
        text = self.expression.replace("$__rate_interval", RATE_INTERVAL)
        return Query(PORTS[self.datasource], text)


def load() -> dict[str, dict[str, Any]]:
    """Each dashboard by the name of its file."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json"))}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something: no rows."""
    return [p for p in dashboard["panels"] if p["type"] != "row"]


def asked() -> list[Asked]:
    """Every query of every dashboard."""
    found = []
    for uid, dashboard in load().items():
        for panel in panels(dashboard):
            found += [
                Asked(uid, panel["title"], t["datasource"]["uid"], t["expr"])
                for t in panel["targets"]
            ]
        found += [
            Asked(uid, row["name"], row["datasource"]["uid"], row["expr"])
            for row in dashboard["annotations"]["list"]
        ]
    return found


_FUNCTIONS = (
    r"avg|by|count|histogram_quantile|increase|max|min|rate|sum|time|vector|or|on|group_right|"
    r"sort_desc|avg_over_time"
)


def metrics(expression: str) -> list[str]:
    """The names of metrics and recorded series in a query, in its order."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on|group_right) ?\([^)]*\)", " ", expression)
    names = re.findall(r"[a-zA-Z_][a-zA-Z0-9_:]*", bare)
    return list(dict.fromkeys(n for n in names if not re.fullmatch(_FUNCTIONS, n)))
