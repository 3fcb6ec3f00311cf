"""The controller at work, drawn from the JSON of `benchmarks.load` alone, as PNG and SVG.

    python -m benchmarks.load.plot load-cpu.json OUTDIR

`widths`: requests in flight rise and fall; below, the widths of rounds; below, output tokens per second of plain
SGLang, of the largest width, and of widths that follow traffic. Every server has its own run of the same steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load.figures import ADAPTIVE, PLAIN

_COLOURS = {PLAIN: "#555555", ADAPTIVE: "#0072b2", "fixed": "#d55e00"}
_FORMATS = ("png", "svg")
# Spans of a timeline are averaged over so many.
_SMOOTHED = 5

Rows = Sequence[Mapping[str, Any]]


def smoothed(rows: Rows, field: str, count: int = _SMOOTHED) -> list[float]:
    """Running means over at most so many spans before and including each."""
    values = [float(row[field]) for row in rows]
    return [sum(values[max(0, index - count + 1) : index + 1]) / min(count, index + 1) for index in range(len(values))]


def names(steps: Mapping[str, Rows]) -> dict[str, str]:
    """What the servers of the steps are called in the picture."""
    fixed = {name: f"width {name} always" for name in steps if name.isdecimal()}
    return {PLAIN: "plain SGLang", **fixed, ADAPTIVE: "widths that follow"}


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the picture, and return its files."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps: Mapping[str, Rows] = result["steps"]
    figure, (requests, widths, speed) = plt.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    adaptive = steps[ADAPTIVE]
    seconds = [row["second"] for row in adaptive]
    requests.step(seconds, [row["requests"] for row in adaptive], where="post", color=_COLOURS[ADAPTIVE])
    requests.set_ylabel("requests in a batch")
    for row in adaptive:
        widths.plot([row["second"]] * len(row["widths"]), row["widths"], ".", color=_COLOURS[ADAPTIVE], markersize=3)
    seen = sorted({width for row in adaptive for width in row["widths"]})
    widths.set_yscale("log", base=2)
    widths.set_yticks(seen, [str(width) for width in seen])
    widths.set_ylabel("width of rounds")
    for server, label in names(steps).items():
        rows = steps[server]
        colour = _COLOURS.get(server, _COLOURS["fixed"])
        speed.plot(
            [row["second"] for row in rows], smoothed(rows, "tokens_per_second"), color=colour, label=label, linewidth=1
        )
    speed.set_ylabel("output tokens per second")
    speed.set_xlabel("seconds")
    speed.set_ylim(bottom=0)
    speed.legend()
    where = result["provenance"]["gpu"] or result["provenance"]["cpu"]
    figure.suptitle(f"Widths that follow traffic ({where})")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"widths.{suffix}" for suffix in _FORMATS]
    for file in files:
        figure.savefig(file, dpi=150)
    plt.close(figure)
    return files


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for file in draw(json.loads(options.result.read_text()), options.folder):
        print(file)


if __name__ == "__main__":
    main()
