"""A policy whose widths follow traffic, by what rounds cost on this machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.runtime_context import get_schedule

from sglang_orthrus import ranks
from sglang_orthrus.config import speed_floor
from sglang_orthrus.metrics import WidthMetrics
from sglang_orthrus.passes.runner import DualViewRunner
from sglang_orthrus.passes.timing import batch_sizes, time_rounds
from sglang_orthrus.round.costs import RoundCosts
from sglang_orthrus.round.device_watch import DeviceWatch
from sglang_orthrus.round.policy import CountsForced, Policy
from sglang_orthrus.round.width_controller import WidthController

logger = logging.getLogger(__name__)

# Larger batches that no graph covers are extrapolated.
_EAGER_BATCH = 8
_TIMING_SECONDS = 5.0


def adaptive_policy(
    passes: DualViewRunner,
    model_runner: Any,
    widths: Sequence[int],
    grammars: CountsForced,
    reporting: tuple[int, str | None],
) -> Policy:
    """Time rounds of every width at start-up, for up to 5 seconds, and log what they cost.

    Args:
        passes: with graphs.
        model_runner: SGLang's.
        widths: that rounds may have, ascending.
        grammars: know what is forced.
        reporting: see `WidthMetrics`.
    """
    graph_sizes = passes.graph_sizes
    max_requests = model_runner.max_running_requests
    sizes = {width: batch_sizes(min(max_requests, max(graph_sizes[width], default=_EAGER_BATCH))) for width in widths}
    with torch.inference_mode():
        times = time_rounds(passes, model_runner, sizes, _TIMING_SECONDS)
    costs = RoundCosts(times.seconds, graph_sizes, times.context, times.context_seconds)
    rows = costs.as_rows()
    for row in rows:
        pairs = zip(costs.widths, row.seconds, strict=True)
        by_width = ", ".join(f"{width}: {1e3 * cost:.2f}" for width, cost in pairs)
        logger.info("ORTHRUS milliseconds of a round of %d requests by width: %s", row.batch_size, by_width)
    logger.info(
        "ORTHRUS timed these rounds behind %d tokens of context each; 10,000 more take milliseconds by width: %s",
        times.context,
        ", ".join(f"{width}: {1e7 * cost:.2f}" for width, cost in times.context_seconds.items()) or "not timed",
    )
    timed = {width: {row.batch_size: row.seconds[at] for row in rows} for at, width in enumerate(costs.widths)}
    metrics = WidthMetrics(*reporting, timed)
    controller = None
    if ranks.is_first():
        controller = WidthController(
            costs,
            floor=speed_floor(),
            # Retracted requests are remembered, too.
            max_requests=2 * max_requests,
            rounds_late=0 if get_schedule().disable_overlap_schedule else 1,
        )
    device = model_runner.device
    return Policy(
        *(widths, controller, metrics),
        is_shared=ranks.are_several(),
        runs_at_once=device == "cpu",
        grammars=grammars,
        watch=DeviceWatch(device),
    )
