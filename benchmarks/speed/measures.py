"""What the sweep derives from the requests of one run of the load generator. Pure: no server.

A *pass* is what yields tokens: a decode step of plain SGLang, a draft-and-verify round of a speculative algorithm.
The prefill yields the first token, so a plain answer of n tokens took n - 1 steps.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np

SERVE_METRICS = (
    *("completed", "duration", "total_input_tokens", "request_throughput", "output_throughput", "concurrency"),
    *(f"{kind}_{metric}_ms" for metric in ("ttft", "tpot", "itl") for kind in ("mean", "median", "p99")),
)


@dataclass(frozen=True)
class Request:
    """One answered request as the load generator saw it; times in seconds.

    Attributes:
        first: when the first chunk came.
        chunks: (time since the former chunk, tokens) of every later one.
        passes: see the module; of a speculative algorithm, its verify passes.
    """

    family: str
    first: float
    ttft: float
    latency: float
    chunks: tuple[tuple[float, int], ...]
    tokens: int
    passes: int
    text: str

    @property
    def arrivals(self) -> list[float]:
        """When the chunks came, the first one included."""
        return list(accumulate((gap for gap, _ in self.chunks), initial=self.first))


def chunks_of(latencies: Sequence[float]) -> tuple[tuple[float, int], ...]:
    """(seconds, tokens) of every chunk after the first.

    latencies: SGLang's list, which holds for each token its chunk's time divided by the chunk's tokens.
    """
    runs = ((value, len(list(run))) for value, run in groupby(latencies))
    return tuple((value * length, length) for value, length in runs)


def gaps_while_all_decode(requests: Sequence[Request], concurrency: int) -> list[float]:
    """Seconds between two chunks of a request, taken while `concurrency` requests decode.

    A request decodes from its first chunk to its last one. As no more than `concurrency` are in flight, none is
    being prefilled then.
    """
    first = np.array([request.first for request in requests])
    last = np.array([request.arrivals[-1] for request in requests])
    gaps = []
    for request in requests:
        times = np.array(request.arrivals)
        begin, end = times[:-1, None], times[1:, None]
        decoding = ((first <= begin) & (last >= end)).sum(axis=1)
        gaps += (times[1:] - times[:-1])[decoding == concurrency].tolist()
    return gaps


def decode_measures(
    requests: Sequence[Request], concurrency: int, step_seconds: Sequence[float] = ()
) -> dict[str, Any]:
    """Times of decode passes alone.

    - `pass_ms`: median time between two chunks of a request while all requests decode;
    - `mean_pass_ms`: the requests' time from first to last chunk over their passes, whoever else runs;
    - `chunks_per_pass`: 1 if every pass made a chunk. If it is lower, the HTTP side merged chunks and `pass_ms` is
      too high: `server_pass_ms` is the one to trust then;
    - `server_pass_ms`: the scheduler's own median (`step_seconds`), for batches of `concurrency` requests.
    """
    gaps = gaps_while_all_decode(requests, concurrency)
    passes = sum(request.passes for request in requests)
    spans = sum(request.arrivals[-1] - request.first for request in requests)
    return {
        "pass_ms": _milliseconds(statistics.median(gaps)) if gaps else None,
        "gaps": len(gaps),
        "mean_pass_ms": _milliseconds(spans / passes) if passes else None,
        "chunks_per_pass": round(sum(len(request.chunks) for request in requests) / max(passes, 1), 3),
        "server_pass_ms": _milliseconds(statistics.median(step_seconds)) if step_seconds else None,
        "server_samples": len(step_seconds),
    }


def serve_measures(metrics: Mapping[str, Any], requests: Sequence[Request]) -> dict[str, Any]:
    """SGLang's metrics of a run, tokens per cycle, the same by family, and a digest of every answer."""
    by_family: defaultdict[str, list[Request]] = defaultdict(list)
    for request in requests:
        by_family[request.family].append(request)
    return {
        **{name: round(float(metrics[name]), 4) for name in SERVE_METRICS},
        **asdict(_total(requests)),
        "tokens_per_cycle": tokens_per_cycle(requests),
        "families": {family: asdict(_total(group)) for family, group in sorted(by_family.items())},
        "answers": " ".join(digest(request.text) for request in requests),
    }


def median_ttft_ms(requests: Iterable[Request]) -> float:
    """Of requests that all have an answer."""
    return _milliseconds(statistics.median(request.ttft for request in requests))


def tokens_per_cycle(requests: Iterable[Request]) -> float:
    """(Tokens - 1) over passes, weighted by passes; 1 for plain SGLang."""
    total = _total(requests)
    return round((total.tokens - total.requests) / total.passes, 3) if total.passes else 1.0


def digest(text: str) -> str:
    """Six hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


@dataclass(frozen=True)
class _Total:
    requests: int
    tokens: int
    passes: int
    decode_s: float


def _total(requests: Iterable[Request]) -> _Total:
    found = list(requests)
    return _Total(
        len(found),
        sum(request.tokens for request in found),
        sum(request.passes for request in found),
        round(sum(request.latency - request.ttft for request in found), 4),
    )


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 4)
