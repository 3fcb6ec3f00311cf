"""Which requests ORTHRUS answers. What it could not answer exactly is refused, never answered differently."""

from __future__ import annotations

from typing import Any, NamedTuple


class _Rule(NamedTuple):
    option: str
    is_set: Any  # Callable[[Req], bool]


def _sampling(name: str, default: float) -> Any:
    return lambda req: getattr(req.sampling_params, name) != default


def _is_sampled(req: Any) -> bool:
    # SGLang turns temperature 0 into top_k 1, so this is the one test for greedy. Its frontend language fills the
    # cache with requests for no token at all, at the default temperature.
    return req.sampling_params.top_k != 1 and req.sampling_params.max_new_tokens != 0


_RULES = (
    _Rule("temperature above 0 (send temperature 0)", _is_sampled),
    _Rule("frequency_penalty", _sampling("frequency_penalty", 0.0)),
    _Rule("presence_penalty", _sampling("presence_penalty", 0.0)),
    _Rule("repetition_penalty", _sampling("repetition_penalty", 1.0)),
    _Rule("min_new_tokens", _sampling("min_new_tokens", 0)),
    _Rule("logit_bias", lambda req: bool(req.sampling_params.logit_bias)),
    _Rule("beam_width", lambda req: (req.sampling_params.beam_width or 1) > 1),
    _Rule("watermark", lambda req: req.sampling_params.watermark is not None),
    _Rule("custom_logit_processor", lambda req: bool(req.custom_logit_processor)),
    _Rule("return_logprob (logprobs)", lambda req: req.return_logprob),
    _Rule("return_hidden_states", lambda req: req.return_hidden_states_mode.need_capture()),
    _Rule("return_routed_experts", lambda req: req.return_routed_experts),
    _Rule("return_sampling_mask", lambda req: req.return_sampling_mask),
    _Rule("lora_path", lambda req: req.lora_id is not None),
)


def refusal(req: Any) -> str | None:
    """Why a request can't be served exactly yet, naming every offending option; None if it can.

    Follows SGLang's `validate_uno_request`. req: `sglang.srt.managers.schedule_batch.Req`, parameters normalised.
    """
    options = [rule.option for rule in _RULES if rule.is_set(req)]
    if not options:
        return None
    return (
        "--speculative-algorithm ORTHRUS does not support these request options yet: "
        f"{', '.join(options)}. Leave them out, or serve the model without --speculative-algorithm."
    )
