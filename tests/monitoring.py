"""What docs/monitoring asks of Prometheus: the queries of the dashboard and of the alert rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "monitoring"
DASHBOARD = FOLDER / "orthrus-dashboard.json"
RULES = FOLDER / "orthrus-alerts.yaml"
RULE_TESTS = FOLDER / "orthrus-alerts-test.yaml"
CONFIG = FOLDER / "prometheus.yaml"
PAGE = FOLDER / "README.md"

_METRIC = r"(?:\bup\b|\bsglang(?:_orthrus)?:\w+)"


class Panel(NamedTuple):
    """A panel of the dashboard: its queries, and what it says of itself."""

    title: str
    description: str
    queries: tuple[str, ...]


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def panels() -> list[Panel]:
    """All panels of the dashboard."""
    return [
        Panel(panel["title"], panel["description"], tuple(target["expr"] for target in panel["targets"]))
        for panel in dashboard()["panels"]
    ]


def rules() -> dict[str, str]:
    """The expression of every alert, by its name."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def metrics_in(query: str) -> set[str]:
    """Names of the metrics in a query."""
    return set(re.findall(_METRIC, query))


def selectors_in(query: str) -> set[str]:
    """The metrics in a query with their labels, without a range."""
    return set(re.findall(_METRIC + r"(?:\{[^}]*\})?", query))
