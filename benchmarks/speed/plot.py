"""Charts of a sweep, from its JSON alone, as PNG and SVG.

    python -m benchmarks.speed.plot results.json OUTDIR

`speed_up`, `decode_speed_up` and `round_cost` against concurrency, `throughput` against context length. Every axis of
values starts at 0, and a line marks plain SGLang, so that a loss is seen as one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]
NAMES = {"plain": "plain SGLang", "orthrus": "ORTHRUS", "ngram": "NGRAM"}
COLOURS = {"plain": "#555555", "orthrus": "#0072b2", "ngram": "#d55e00"}
MARKERS = {"plain": "s", "orthrus": "o", "ngram": "^"}
_FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Line:
    """One server's points, in the order of the axis."""

    server: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        reference: a horizontal line, and what it stands for.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    reference: tuple[float, str] | None = None


def charts(result: Json) -> list[Chart]:
    """Those that the result has points for."""
    rows = result["report"]["settings"]
    loaded = [row for row in rows if row["context"] is None]
    lengthened = [row for row in rows if row["context"] is not None]
    throughput = Line("plain", tuple((row["context"], row["plain_throughput"]) for row in lengthened))
    found = (
        Chart(
            "speed_up",
            "Speed-up over plain SGLang, end to end",
            "requests in flight",
            "output tokens per second, relative",
            peer_lines(loaded, "concurrency", lambda row, peer: peer["speed_up"]),
            (1, "plain SGLang"),
        ),
        Chart(
            "decode_speed_up",
            "Speed-up of decoding, JSON and tool calls",
            "requests in flight",
            "tokens per second after the first, relative",
            peer_lines(loaded, "concurrency", lambda row, peer: peer["decode_speed_up_json_and_tools"]),
            (1, "plain SGLang"),
        ),
        Chart(
            "round_cost",
            "Cost of a round = tokens per cycle to break even",
            "requests in flight",
            "round time / plain step time, decode only",
            peer_lines(loaded, "concurrency", lambda row, peer: peer["round_cost"]),
            (2, "two forward passes"),
        ),
        Chart(
            "throughput",
            "Throughput by context length, one request at a time",
            "tokens of the prompt",
            "output tokens per second, prefill included",
            (
                throughput,
                *peer_lines(lengthened, "context", lambda row, peer: peer["throughput"]),
            ),
        ),
    )
    return [chart for chart in found if any(line.points for line in chart.lines)]


def peer_lines(rows: Sequence[Json], x: str, y: Callable[[Json, Json], float | None]) -> tuple[Line, ...]:
    """A line for every speculating server."""
    labels = dict.fromkeys(label for row in rows for label in row["peers"])
    return tuple(
        Line(
            label,
            tuple(
                (row[x], value)
                for row in rows
                if label in row["peers"] and (value := y(row, row["peers"][label])) is not None
            ),
        )
        for label in labels
    )


def caption(result: Json) -> str:
    """Hardware, date, commit, command."""
    source = result["provenance"]
    shape = result["arguments"]["model"]["released_shape"]
    model = f"nano widened to the {shape} shape" if shape else "orthrus-nano"
    missing = [f"{name}: not run" for name, server in result["servers"].items() if "skipped" in server]
    return (
        f"{source['gpu'] or source['cpu']} | {model} | {source['date'][:10]} | commit {source['commit'][:12]}"
        f"{'-dirty' * source['commit'].endswith('-dirty')} | SGLang {source['versions']['sglang']}\n"
        f"python -m benchmarks.{' '.join(source['command'])}{''.join(f' | {text}' for text in missing)}"
    )


def draw(chart: Chart, text: str, folder: Path) -> list[Path]:
    """Write the chart in every format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {"svg.hashsalt": "sweep", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    for line in chart.lines:
        axes.plot(
            *zip(*line.points, strict=True),
            color=COLOURS.get(line.server),
            marker=MARKERS.get(line.server, "o"),
            label=NAMES.get(line.server, line.server),
            gid=f"line-{line.server}",
        )
    if chart.reference is not None:
        value, meaning = chart.reference
        axes.axhline(value, color=COLOURS["plain"], linestyle="--", linewidth=1, label=meaning)
    ticks = sorted({x for line in chart.lines for x, _ in line.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=30 if max(ticks) > 999 else 0)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.legend(frameon=False)
    figure.supxlabel(text, fontsize=7, color="#555555")
    paths = [folder / f"{chart.name}.{suffix}" for suffix in _FORMATS]
    for path in paths:
        # Without a date, the same JSON gives the same file.
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def plot(result: Json, folder: Path) -> list[Path]:
    """All charts."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for chart in charts(result) for path in draw(chart, caption(result), folder)]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for path in plot(json.loads(arguments.result.read_text()), arguments.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
