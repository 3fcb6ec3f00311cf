"""Differences of two sweeps, setting by setting.

python -m benchmarks.speed.compare a.json b.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.report import aligned, ratio
from benchmarks.speed.sweep import differences

METRICS = (
    ("serve", "output_throughput"),
    ("serve", "median_ttft_ms"),
    ("serve", "median_tpot_ms"),
    ("serve", "tokens_per_cycle"),
    ("decode", "pass_ms"),
)


@dataclass(frozen=True)
class Difference:
    """One figure in both sweeps; None where a sweep lacks it."""

    server: str
    setting: str
    metric: str
    first: float | None
    second: float | None

    @property
    def ratio(self) -> float | None:
        """The second over the first."""
        return ratio(self.second, self.first)


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Every metric of every point that one of them has."""
    return [
        Difference(server, setting, metric, _value(first, server, setting, part, metric), value)
        for server, setting in dict.fromkeys([*_points(first), *_points(second)])
        for part, metric in METRICS
        if (value := _value(second, server, setting, part, metric)) is not None
        or _value(first, server, setting, part, metric) is not None
    ]


def table(found: list[Difference]) -> str:
    """As aligned text."""
    header: tuple[str, ...] = ("server", "setting", "metric", "first", "second", "second/first")
    rows = ((one.server, one.setting, one.metric, *_numbers(one)) for one in found)
    return aligned([header, *rows])


def _points(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for label, server in result["servers"].items():
        for name in server.get("points", {}):
            yield label, name


def _value(result: Mapping[str, Any], server: str, setting: str, part: str, metric: str) -> float | None:
    point = result["servers"].get(server, {}).get("points", {}).get(setting)
    return None if point is None else point[part][metric]


def _numbers(one: Difference) -> Iterator[str]:
    for value in (one.first, one.second, one.ratio):
        yield "-" if value is None else f"{value:.3f}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    first, second = (json.loads(path.read_text()) for path in (arguments.first, arguments.second))
    # Figures of unlike runs are not to be read as progress.
    for name in differences(first["key"], second["key"]):
        print(f"differs: {name}")
    print(table(compare(first, second)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
