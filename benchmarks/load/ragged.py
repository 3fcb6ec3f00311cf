"""Would fewer verify rows pay? A simulation of rounds whose requests verify unlike numbers of drafts.

    python -m benchmarks.load.ragged [OUT.json]

Within a width, each request verifies its drafts while the product of the diffusion view's own probabilities is at least
a threshold, and the rows of all requests are packed. What packing costs beside rows is left out, and the best threshold
for each batch size is taken afterwards: so the gain is an upper bound.

- Acceptance: nano's greedy answers to held-out prompts of all families, fp32, every position of an answer once. A
  greedy text does not depend on drafts, so this is exact.
- Time: passes of the 8B shape on an H200 with FA3, as the server timed them at its start (docs/log.md, 2026-11-29). A
  pass over rows between two measurements is interpolated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common.greedy import MAX_NEW_TOKENS, load_prompts, stop_ids
from benchmarks.common.provenance import provenance
from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO

WIDTHS = (8, 16, 32)
SIZES = (16, 32, 64, 128)
# Milliseconds of a round, by batch size and width; width 1 is the verify pass alone.
ROUND_MS = {
    16: {1: 5.53, 8: 12.17, 16: 14.48, 32: 22.78},
    32: {1: 6.03, 8: 15.50, 16: 23.56, 32: 44.28},
    64: {1: 6.98, 8: 25.25, 16: 45.22, 32: 87.28},
    128: {1: 8.90, 8: 47.43, 16: 88.54, 32: 173.27},
}
THRESHOLDS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
PROMPTS = 54
ROUNDS = 400


class Position(NamedTuple):
    """A draft block at one position of an answer.

    Attributes:
        matches: leading drafts that the autoregressive view would have chosen.
        products: [W-1] running products of the drafts' probabilities.
    """

    matches: int
    products: np.ndarray


Answer = dict[int, list[Position]]


def answer_of(reference: Reference, prompt: Sequence[int], stops: Sequence[int]) -> Answer:
    """Width -> the block at every position of a greedy answer."""
    state = reference.new_state()
    tokens = [int(reference.extend(state, prompt)[-1].argmax())]
    drafted: dict[int, list[tuple[list[int], np.ndarray]]] = {width: [] for width in WIDTHS}
    while len(tokens) < MAX_NEW_TOKENS and tokens[-1] not in stops:
        for width, found in drafted.items():
            best = reference.draft_logits(state, tokens[-1], width)[:-1].softmax(-1).max(-1)
            found.append((best.indices.tolist(), best.values.double().cumprod(0).numpy()))
        tokens.append(int(reference.extend(state, tokens[-1:])[-1].argmax()))
    return {
        width: [Position(_matches(drafts, tokens[at + 1 :]), products) for at, (drafts, products) in enumerate(found)]
        for width, found in drafted.items()
    }


def _matches(drafts: Sequence[int], tokens: Sequence[int]) -> int:
    count = 0
    while count < min(len(drafts), len(tokens)) and drafts[count] == tokens[count]:
        count += 1
    return count


def pass_ms(size: int, rows: float) -> float:
    """Of one pass of a batch over so many rows of all its requests."""
    by_width = ROUND_MS[size]
    known = [size * width for width in by_width]
    return float(np.interp(rows, known, [ms / (1 if width == 1 else 2) for width, ms in by_width.items()]))


def speed(answers: Sequence[Answer], size: int, width: int, threshold: float | None) -> tuple[float, float]:
    """Tokens per millisecond, and verify rows per request, of a closed loop; threshold: None for the whole block."""
    random = np.random.default_rng(0)
    running = [[answer[width], 0] for answer in random.choice(np.array(answers, object), size)]
    tokens = total_ms = total_rows = 0.0
    for _ in range(ROUNDS):
        rows = 0
        for request in running:
            positions, at = request
            matches, products = positions[at]
            kept = width - 1 if threshold is None else int((products >= threshold).sum())
            rows += 1 + kept
            committed = min(min(matches, kept) + 1, len(positions) - at)
            tokens += committed
            request[1] = at + committed
            if request[1] >= len(positions):
                request[:] = [random.choice(np.array(answers, object))[width], 0]
        total_ms += pass_ms(size, size * width) + pass_ms(size, rows)
        total_rows += rows
    return tokens / total_ms, total_rows / size / ROUNDS


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reference, stops = Reference(NANO), tuple(stop_ids(NANO))
    prompts = load_prompts(NANO, PROMPTS)
    answers = [answer for prompt in prompts if len((answer := answer_of(reference, prompt.ids, stops))[8]) > 1]
    result: dict[str, Any] = {"provenance": provenance(), "answers": len(answers), "rows": []}
    for size in SIZES:
        whole = {width: speed(answers, size, width, None)[0] for width in WIDTHS}
        cut = {
            (width, threshold): speed(answers, size, width, threshold) for width in WIDTHS for threshold in THRESHOLDS
        }
        best_width = max(whole, key=lambda width: whole[width])
        width, threshold = max(cut, key=lambda key: cut[key][0])
        result["rows"].append(
            {
                "requests": size,
                "whole": {str(width): round(1e3 * found) for width, found in whole.items()},
                "best_width": best_width,
                "cut": {
                    "width": width,
                    "threshold": threshold,
                    "tokens_per_second": round(1e3 * cut[width, threshold][0]),
                    "verify_rows_per_request": round(cut[width, threshold][1], 2),
                },
                "gain": round(cut[width, threshold][0] / whole[best_width] - 1, 4),
            }
        )
        print(json.dumps(result["rows"][-1]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
