"""All changes to SGLang at run time, in their order.

SGLang's own HookRegistry is not used for them: it only logs that a hook failed, and it skips a target that it has
patched before. A server of ours without one of these changes would answer wrongly or die, so it must not start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_orthrus.compat.accounting import count_tokens_of_texts
from sglang_orthrus.compat.grammars import (
    begin_llguidance_behind_a_reasoning,
    fail_only_if_told,
    keep_allowed_logits,
)
from sglang_orthrus.compat.logprobs import select_top_logprobs_per_request
from sglang_orthrus.compat.memory import widen_req_to_token_rows
from sglang_orthrus.compat.requests import (
    RequestChecks,
    answer_value_errors_with_400,
    check_requests,
    drop_processors_of_aborted,
    update_weights_one_at_a_time,
)
from sglang_orthrus.compat.scheduler import check_weight_updates, fence_delayed_rounds, refuse_requests
from sglang_orthrus.compat.stops import continue_sessions_at_the_end, stop_at_first_match
from sglang_orthrus.compat.streaming import parse_tool_calls_word_by_word


def install_in_http_server(checks: RequestChecks) -> None:
    """Change the process that answers HTTP; a second call changes nothing."""
    parse_tool_calls_word_by_word()
    check_requests(checks)
    answer_value_errors_with_400()
    update_weights_one_at_a_time()


def install_in_scheduler(
    block_size: int, refusal: Callable[[Any], str | None], weights_problem: Callable[[str], str | None]
) -> None:
    """Change a scheduler process before its memory pools are made; a second call changes nothing.

    Args:
        block_size: F.
        refusal: why a request can't be served; None if it can.
        weights_problem: why a folder's weights can't be loaded; None if they can.
    """
    widen_req_to_token_rows(block_size)
    refuse_requests(refusal)
    check_weight_updates(weights_problem)
    keep_allowed_logits()
    select_top_logprobs_per_request()
    drop_processors_of_aborted()
    begin_llguidance_behind_a_reasoning()
    fail_only_if_told()
    stop_at_first_match()
    continue_sessions_at_the_end()
    fence_delayed_rounds()
    count_tokens_of_texts()
