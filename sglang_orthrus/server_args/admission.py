"""Which requests ORTHRUS answers. What it could not answer exactly is refused, never answered differently."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.server_args.admission_values import Numbers, computed_fields, value_problem, without_pitfalls


class _Rule(NamedTuple):
    option: str
    is_set: Callable[[Any], bool]


_RULES = (
    _Rule("beam_width", lambda req: (req.sampling_params.beam_width or 1) > 1),
    _Rule("watermark", lambda req: req.sampling_params.watermark is not None),
    _Rule("return_hidden_states", lambda req: bool(req.return_hidden_states_mode.need_capture())),
    _Rule("return_routed_experts", lambda req: bool(req.return_routed_experts)),
    _Rule("return_sampling_mask", lambda req: bool(req.return_sampling_mask)),
    _Rule("lora_path", lambda req: req.lora_id is not None),
)


def refusal(req: Any, are_seeded: bool = False) -> str | None:
    """Why the scheduler can't serve a request exactly, naming every offending option; None if it can.

    Follows SGLang's `validate_uno_request`.

    Args:
        req: `sglang.srt.managers.schedule_batch.Req`, parameters normalised.
        are_seeded: whether seeds act, that is, under `--enable-deterministic-inference`.
    """
    options = [rule.option for rule in _RULES if rule.is_set(req)]
    if options:
        return (
            "--speculative-algorithm ORTHRUS does not support these request options yet: "
            f"{', '.join(options)}. Leave them out, or serve the model without --speculative-algorithm."
        )
    if are_seeded and req.sampling_params.min_p > 0 and req.sampling_params.top_k > 1:
        # SGLang's own sampler fails an assertion, which ends the scheduler (patches/0004).
        return "min_p has no seeded form in SGLang: leave it out, or serve without --enable-deterministic-inference."
    if not req.origin_input_ids:
        return "input_ids: empty; at least one token is needed."
    # Again, for what did not come through SGLang's TokenizerManager.
    top = req.logprob.top_logprobs_num if req.return_logprob else 0
    ids = req.logprob.token_ids_logprob or ()
    numbers = Numbers(req.origin_input_ids, top_logprobs_num=top, token_ids_logprob=ids)
    return value_problem(numbers, req.sampling_params, req.vocab_size) or _processor_problem(req)


@depends_on(
    "sglang.srt.sampling.custom_logit_processor:CustomLogitProcessor.from_str",
    "json_str",
    what="called in the scheduler: a request's processor is tried before the request joins a batch",
    why="a processor that cannot be loaded or fails on its parameters ends the scheduler",
    until="SGLang answers 400 to it",
)
def _processor_problem(req: Any) -> str | None:
    """Why a custom logit processor does not work with the request's parameters, by trial on one row of logits."""
    if req.custom_logit_processor is None:
        return None
    params = req.sampling_params.custom_params
    if isinstance(params, dict):
        params = params | {"__req__": req}
    try:
        processor = CustomLogitProcessor.from_str(req.custom_logit_processor)
        row = processor(torch.zeros(1, req.vocab_size), [params])
        if row.shape != (1, req.vocab_size):
            return f"custom_logit_processor: it returned logits of shape {list(row.shape)} for one row."
    except Exception as error:  # noqa: BLE001 (a client's code)
        return f"custom_logit_processor: {type(error).__name__}: {error}, on one row of logits with its custom_params."
    return None


def raw_problem(request: Any) -> str | None:
    """Why a request can't be read; None if it can.

    request: SGLang's `GenerateReqInput` or `EmbeddingReqInput`, one of a batch.
    """
    return computed_fields(request.sampling_params)


def tokenized_problem(
    request: Any, vocab_size: int, hidden_size: int | None = None, context_length: int = 0
) -> str | None:
    """Why a request may not be sent to the scheduler; None if it may. Drops what the scheduler can't use.

    Args:
        request: SGLang's `TokenizedGenerateReqInput` or `TokenizedEmbeddingReqInput`.
        vocab_size: of the model.
        hidden_size: of the model, for embeddings given instead of tokens.
        context_length: of the model; a session's history, which only the scheduler knows, is not longer.
    """
    problem = value_problem(_numbers(request, context_length), request.sampling_params, vocab_size, hidden_size)
    if problem is None:
        without_pitfalls(request.sampling_params, vocab_size)
        if hasattr(request, "top_logprobs_num") and not getattr(request, "return_logprob", False):
            # The scheduler looks up as many for every request of a batch as any of them names.
            request.top_logprobs_num = 0
    return problem


@depends_on(
    "sglang.srt.managers.io_struct:msgpack_encode",
    "obj",
    what="called on a request without its long fields",
    why="a field of another type than the scheduler expects ends the scheduler",
    until="SGLang answers 400 to such fields (patches/0014)",
)
@depends_on(
    "sglang.srt.managers.utils:msgpack_decode_explained",
    "data",
    what="called on the encoded request, as the scheduler does",
    why="a field of another type than the scheduler expects ends the scheduler",
    until="SGLang answers 400 to such fields (patches/0014)",
)
def unreadable(request: Any) -> str | None:
    """Why the scheduler could not decode a request: a field of another type, which HTTP lets through; None if it can.

    request: as above. Its long fields are not tried: SGLang made them.
    """
    from sglang.srt.managers.io_struct import msgpack_encode
    from sglang.srt.managers.utils import msgpack_decode_explained

    tried = copy(request)
    for field in ("input_text", "input_ids", "input_embeds", "mm_inputs", "time_stats"):
        if getattr(tried, field, None) is not None:
            setattr(tried, field, None)
    try:
        msgpack_decode_explained(msgpack_encode(tried))
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        return f"The request can't be passed on to the scheduler: {error}"
    return None


def _numbers(request: Any, context_length: int) -> Numbers:
    def given(field: str, default: Any) -> Any:
        value = getattr(request, field, None)
        return default if value is None else value

    wants_logprobs = given("return_logprob", False)
    ids = given("input_ids", ())
    room = max(context_length - len(ids), 0)
    max_new_tokens = getattr(request.sampling_params, "max_new_tokens", None)
    return Numbers(
        ids,
        given("top_logprobs_num", 0) if wants_logprobs else 0,
        given("logprob_start_len", -1) if wants_logprobs else -1,
        given("token_ids_logprob", ()),
        tuple((field, given(field, ())) for field in ("multi_item_delimiter_indices", "token_indices_to_pool")),
        tuple(len(row) for row in given("input_embeds", ())),
        room if given("session_params", None) else 0,
        (room if max_new_tokens is None else min(max_new_tokens, room)) if wants_logprobs else 0,
    )
