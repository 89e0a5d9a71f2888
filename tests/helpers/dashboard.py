"""The Grafana dashboard of the project and its queries."""

from __future__ import annotations

import functools
import json
import re
from typing import Any, NamedTuple

from tests.helpers.data import PROJECT

PATH = PROJECT / "cluster" / "grafana" / "stgt.json"
VARIABLES = {"$__rate_interval": "1m", "$run": ".*"}
"""Grafana's variables, and what stands for them here."""
NAME = re.compile(r"\bray_[a-z0-9_]+\b")


class Query(NamedTuple):
    """One query of a panel, without Grafana's variables."""

    panel: str
    expression: str

    @property
    def names(self) -> set[str]:
        """Names of the metrics that it reads: all begin with Ray's prefix."""
        return set(NAME.findall(self.expression))


@functools.cache
def dashboard() -> dict[str, Any]:
    return json.loads(PATH.read_text())


def queries() -> list[Query]:
    found = []
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            found.append(Query(panel["title"], expression))
    return found
