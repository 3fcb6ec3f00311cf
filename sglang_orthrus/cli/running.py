"""`python -m sglang_orthrus doctor --url URL`: what a running server says of its rounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import requests

from sglang_orthrus.cli.samples import Sample, parse
from sglang_orthrus.metrics import WIDTH_COSTS, WIDTHS

_TIMEOUT = 10


def run(url: str) -> int:
    """Print the report, and return the exit status: 0 if the server runs ORTHRUS.

    Raises:
        ValueError: nothing that answers at this address is an SGLang server.
    """
    url = url.rstrip("/").removesuffix("/v1")
    try:
        info = requests.get(f"{url}/server_info", timeout=_TIMEOUT)
        info.raise_for_status()
        metrics = requests.get(f"{url}/metrics", timeout=_TIMEOUT)
        found = info.json()
    except requests.RequestException as error:
        raise ValueError(f"--url {url}: no SGLang server answers there ({type(error).__name__}).") from error
    print("\n".join(report(found, metrics.text if metrics.ok else "")))
    return 0 if found.get("speculative_algorithm") == "ORTHRUS" else 1


def report(info: Mapping[str, Any], metrics: str) -> Iterator[str]:
    """Lines on a server, from `/server_info` and the text of `/metrics`, which is empty without --enable-metrics."""
    yield f"{info.get('model_path')}, SGLang {info.get('version')}"
    algorithm = info.get("speculative_algorithm")
    if algorithm != "ORTHRUS":
        yield f"It does not run ORTHRUS: --speculative-algorithm is {algorithm}."
        return
    yield f"It drafts and verifies blocks of {info.get('speculative_num_draft_tokens')} tokens at most."
    samples = list(parse(metrics))
    if not samples:
        yield "It tells no more: start it with --enable-metrics."
    elif any(sample.name == WIDTH_COSTS.name for sample in samples):
        yield from costs(samples)
        yield from traffic(samples)
    else:
        yield "All blocks have that width: ORTHRUS_WIDTHS names no other."


def costs(samples: list[Sample]) -> Iterator[str]:
    """A table of what rounds cost."""
    rows: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for sample in samples:
        if sample.name == WIDTH_COSTS.name:
            rows[int(sample.labels["requests"])][int(sample.labels["width"])] = sample.value
    widths = sorted({width for row in rows.values() for width in row})
    yield ""
    yield "Milliseconds of a round, as timed at start-up:"
    yield " requests" + "".join(f"{f'width {width}':>10}" for width in widths)
    for size, row in sorted(rows.items()):
        yield f"{size:9}" + "".join(f"{1e3 * row[width]:10.2f}" if width in row else " " * 10 for width in widths)


def traffic(samples: list[Sample]) -> Iterator[str]:
    """A table of what rounds were, since the server started."""
    found: defaultdict[int, dict[str, float]] = defaultdict(dict)
    names = {family.name: name for name, family in WIDTHS.items()}
    for sample in samples:
        if sample.name in names:
            found[int(sample.labels["width"])][names[sample.name]] = sample.value
    total = sum(row["rounds"] for row in found.values())
    yield ""
    if not total:
        yield "No round has run yet."
        return
    yield "Rounds since then; the speed is that of plain decoding times so much, by the server's own estimate:"
    yield "    width    rounds    probes  tokens per cycle     speed"
    for width, row in sorted(found.items()):
        tokens = row["tokens"] / row["requests"] if row["requests"] else 0.0
        speed = row["plain_seconds"] / row["seconds"] if row["seconds"] else 0.0
        yield f"{width:9}{row['rounds'] / total:10.1%}{row['probes']:10.0f}{tokens:18.1f}{speed:10.2f}"
