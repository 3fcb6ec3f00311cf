"""An open loop: requests arrive at random times (a Poisson process), whether or not others are answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.greedy import MAX_NEW_TOKENS, Prompt
from benchmarks.load.traffic import Request

# Arrivals per second, relative to the requests per second that plain SGLang answers in a closed loop.
SHARES = (0.1, 0.4, 0.7, 1.0, 1.3)
SECONDS = 8.0
_LEAST = 24
_WARM_UP = 8
_FIGURES = ("ttft_ms", "tpot_ms")


def num_requests(rate: float) -> int:
    """Of a run."""
    return max(_LEAST, round(rate * SECONDS))


def measure(url: str, model: Path, requests: Sequence[Request], rate: float) -> dict[str, Any]:
    """Send requests without grammars to a server with SGLang's load generator.

    Args:
        rate: requests per second.

    Returns:
        Tokens per second from the first arrival to the last answer. Milliseconds until a request's first token, and
        per token behind it: medians and 99th percentiles.
    """
    # Imports SGLang, which takes seconds.
    from benchmarks.speed.load import Load, run_load

    prompts = [Prompt(str(number), request.kind, request.ids) for number, request in enumerate(requests)]
    metrics, _ = run_load(url, model, Load(prompts, _WARM_UP, MAX_NEW_TOKENS, to_the_end=True, rate=rate))
    return {
        "requests": len(requests),
        "output_tokens_per_second": round(metrics["output_throughput"], 1),
        **{
            f"{place}_{figure}": round(metrics[f"{place}_{figure}"], 2)
            for figure in _FIGURES
            for place in ("median", "p99")
        },
    }
