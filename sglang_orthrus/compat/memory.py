"""The scheduler's memory and graphs: sizes that SGLang takes from the names of its own algorithms."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.wrapping import wrap_once


def largest_graph() -> int:
    """The most requests of a CUDA graph, before any is captured; 1 if there will be none."""
    from sglang.srt.runtime_context import get_exec

    return max(get_exec().graph.cuda_graph_config.decode.bs or [1])


@depends_on(
    "sglang.srt.mem_cache.kv_cache_configurator:get_req_to_token_extra_context_len",
    what="wrapped: a row of req_to_token gets room for two blocks past the context length",
    why="SGLang reserves two blocks for a decode step, but its rows have room for one block and four columns",
    until="SGLang sizes the rows from get_alloc_reserve_per_decode() for every algorithm",
)
@depends_on(
    "sglang.srt.mem_cache.allocation_sizing:get_alloc_page_size",
    what="called: a reservation is rounded up to pages",
    why="the page size of an allocation has no public name",
    until="SGLang sizes the rows from get_alloc_reserve_per_decode() for every algorithm",
)
def widen_req_to_token_rows(block_size: int) -> None:
    """Give every request's row of `req_to_token` columns for two blocks past the context length."""
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size

    def headroom(stock: Callable[..., int]) -> Callable[..., int]:
        @wraps(stock)
        def widened(*args: Any, **kwargs: Any) -> int:
            return max(stock(*args, **kwargs), 2 * block_size + get_alloc_page_size() - 1)

        return widened

    wrap_once(kv_cache_configurator, "get_req_to_token_extra_context_len", headroom)


@depends_on(
    "sglang.srt.model_executor.model_runner:ModelRunner._decode_cuda_graph_runner_cls",
    what="replaced on the instance",
    why="the names of SGLang's own algorithms choose the class of the graph runner",
    until="an algorithm can name its graph runner",
)
@depends_on(
    "sglang.srt.model_executor.model_runner:ModelRunner.max_shared_logits_buffer_rows",
    what="replaced on the instance: the buffer gets a row per request",
    why="SGLang allocates fp32 logits for every token of every block, and no graph of ours writes to them",
    until="SGLang asks the graph runner",
)
@depends_on(
    "sglang.srt.model_executor.model_runner:ModelRunner.max_decode_logits_rows",
    what="called for the number of rows that SGLang would allocate",
    why="the number of requests that graphs cover has no public name",
    until="SGLang asks the graph runner",
)
@depends_on(
    "sglang.srt.model_executor.model_runner:ModelRunner.decode_num_tokens_per_req",
    what="called for the number of rows that SGLang counts per request",
    why="it is the width that SGLang captures its graphs with",
    until="SGLang asks the graph runner",
)
def use_graph_runner(model_runner: Any, runner: type) -> None:
    """Have SGLang capture its decode graphs with `runner`, and keep no logits buffer for blocks.

    Call it before the graphs are captured.
    """

    def max_shared_logits_buffer_rows() -> int:
        """A row per request: what prefill graphs use, and plain SGLang allocates."""
        return int(model_runner.max_decode_logits_rows()) // int(model_runner.decode_num_tokens_per_req())

    model_runner._decode_cuda_graph_runner_cls = lambda: runner
    model_runner.max_shared_logits_buffer_rows = max_shared_logits_buffer_rows
