"""Metrics, the page that lists them, and the dashboard and rules that ask for them agree."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import sglang_orthrus
from sglang_orthrus.metrics import FAMILIES, ROUNDS, Family
from tests.monitoring import PAGE, dashboard, metrics_in, panels, rules

PACKAGE = Path(sglang_orthrus.__path__[0])
DOCS = PAGE.parents[1]
OURS = {family.name for family in FAMILIES}


def _exported(family: Family) -> set[str]:
    """The names of a family's series."""
    return {family.name} if family.label else {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}


def _of_sglang() -> str:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "srt" / "observability"
    return "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))


def test_the_page_lists_every_metric_with_its_label_and_no_other() -> None:
    rows = re.findall(
        r"^\| `(sglang_orthrus:\w+)` \| (\w+) \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    listed = {name: (kind, label) for name, kind, label in rows}
    assert len(rows) == len(listed)
    assert set(listed) == OURS
    for family in FAMILIES:
        kind, label = listed[family.name]
        assert kind == family.kind
        assert label.startswith(f"`{family.label}`") or (not family.label and label == "-")
        assert not family.second_label or label.endswith(f", `{family.second_label}`")
        for value in family.values:
            assert f"`{value}`" in label


def test_other_pages_name_no_metric_that_does_not_exist() -> None:
    for page in DOCS.rglob("*.md"):
        for name in re.findall(r"sglang_orthrus:\w+", page.read_text(encoding="utf-8")):
            assert name in OURS, page


def test_no_module_makes_metrics_but_the_one_that_lists_them() -> None:
    makers = [path.name for path in PACKAGE.rglob("*.py") if "prometheus_client" in path.read_text(encoding="utf-8")]
    assert makers == ["metrics.py"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_and_help_texts_follow_the_conventions(family: Family) -> None:
    assert re.fullmatch(r"sglang_orthrus:[a-z_]+", family.name)
    assert family.name.endswith(("_total", "_seconds"))
    assert family.kind != "counter" or family.name.endswith("_total")
    assert re.fullmatch(r"[A-Z].*\.", family.help)


def test_what_the_dashboard_and_the_rules_ask_for_exists() -> None:
    exported = {name for family in FAMILIES for name in _exported(family)}
    theirs = _of_sglang()
    queries = [query for panel in panels() for query in panel.queries] + list(rules().values())
    asked = {name for query in queries for name in metrics_in(query)}
    assert ROUNDS.name in asked and "sglang:token_usage" in asked
    for name in asked:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in exported | {"up"} or any(f'"{known}"' in theirs for known in (name, base)), name


def test_every_metric_of_ours_is_shown() -> None:
    asked = {name for panel in panels() for query in panel.queries for name in metrics_in(query)}
    for family in FAMILIES:
        assert _exported(family) & asked, family.name


def test_panels_are_filtered_by_the_variables_and_do_not_overlap() -> None:
    found = dashboard()
    assert {"datasource", "instance", "model_name"} == {entry["name"] for entry in found["templating"]["list"]}
    for panel in panels():
        for query in panel.queries:
            assert query.count('instance=~"$instance"') == len(re.findall(r"sglang\w*:", query)), panel.title
    cells = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found["panels"]]
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(cells)) == len(set(ids)) == len(cells)
    assert all(panel.description for panel in panels())


def test_the_page_says_what_to_do_about_every_alert() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(rules()) == 3
    for name in rules():
        assert re.search(rf"^\| `{name}` \|", text, re.MULTILINE)
