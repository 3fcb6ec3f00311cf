"""Which requests ORTHRUS answers. What it could not answer exactly is refused, never answered differently."""

from __future__ import annotations

from typing import Any, NamedTuple


class _Rule(NamedTuple):
    option: str
    is_set: Any  # Callable[[Req], bool]


_RULES = (
    _Rule("beam_width", lambda req: (req.sampling_params.beam_width or 1) > 1),
    _Rule("watermark", lambda req: req.sampling_params.watermark is not None),
    _Rule("return_hidden_states", lambda req: req.return_hidden_states_mode.need_capture()),
    _Rule("return_routed_experts", lambda req: req.return_routed_experts),
    _Rule("return_sampling_mask", lambda req: req.return_sampling_mask),
    _Rule("lora_path", lambda req: req.lora_id is not None),
)


def refusal(req: Any, are_seeded: bool = False) -> str | None:
    """Why a request can't be served exactly, naming every offending option; None if it can.

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
    return None
