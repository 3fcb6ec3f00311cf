"""Counts that clients and /metrics see end where the text ends, not where its last round did."""

from __future__ import annotations

from typing import Any

from sglang_orthrus.compat.ledger import Touch

TOKEN_COUNT_TOUCHES: tuple[Touch, ...] = (
    Touch(
        "sglang.srt.managers.schedule_batch:Req.update_reasoning_tokens",
        ("token_id", "think_end_ids"),
        "its count is cut once the request has finished",
        "it counts a whole round before a stop is looked for in it (patches/0016)",
        "SGLang counts up to the end of the text",
    ),
)


def cut_reasoning(req: Any) -> None:
    """Take reasoning tokens past the text's end back; reasoning is what the output begins with."""
    if req.finished_len is not None:
        req.reasoning_tokens = min(req.reasoning_tokens, req.finished_len)
