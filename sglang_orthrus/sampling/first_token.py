"""The first token of every request comes from prefill, and is chosen as if the request had been prefilled alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, apply_custom_logit_processor
from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.sampling_batch_info import ProcessorEntry
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from sglang.srt.utils.async_probe import sanitize_nan_logits

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.sampling.nothing_left import leave_something_inplace, tame_inplace, within_the_grammar


@depends_on(
    "sglang.srt.layers.sampler:Sampler._sample_from_probs",
    "probs",
    "sampling_info",
    "positions",
    "simple_sampling_case",
    what="overridden: a request's first token does not depend on its neighbours' filters",
    why="it picks one path for the whole batch",
    until="SGLang's sampler chooses its path row by row",
)
@depends_on(
    "sglang.srt.layers.sampler:Sampler._preprocess_logits",
    "logits",
    "sampling_info",
    what="overridden: options that together allow no token give way",
    why="a row without a token ends its scheduler",
    until="it leaves every row a token (patches/0013)",
)
class FirstTokenSampler(Sampler):
    """SGLang's sampler, in which a request's filters do not change what its neighbours are given.

    SGLang picks a path for the whole batch. With seeds a filter anywhere in it changes the noise of every row, and with
    FlashInfer min-p anywhere changes the order of filters. The paths that the batch needs all run here, which prefill
    can afford, and every row takes the result of its own.
    """

    def _preprocess_logits(self, logits: torch.Tensor, sampling_info: Any) -> torch.Tensor:
        """As SGLang's, but options that leave no token give way (see `nothing_left`)."""
        if sampling_info.has_custom_logit_processor:
            apply_custom_logit_processor(logits, _one_by_one(sampling_info))
            tame_inplace(logits)
        allowed = getattr(sampling_info, "allowed_logits", None)
        if allowed is not None:
            logits.copy_(within_the_grammar(logits, allowed))
            sampling_info.allowed_logits = None
        if not sampling_info.is_all_greedy:
            leave_something_inplace(logits)
        sanitize_nan_logits(logits, "sampler: next_token_logits")
        return logits

    def _sample_from_probs(
        self, probs: torch.Tensor, sampling_info: Any, positions: torch.Tensor, simple_sampling_case: bool
    ) -> tuple[torch.Tensor, Any]:
        stock = super()._sample_from_probs
        if len(sampling_info) == 1 or simple_sampling_case or sampling_info.sampling_mask_batch_indices is not None:
            return stock(probs, sampling_info, positions, simple_sampling_case)
        info = sampling_info
        if info.sampling_seed is not None:
            # min-p of a greedy request, as no other has it: SGLang's seeded path asserts that nobody asks.
            filtered, _ = stock(probs, replace(info, need_min_p_sampling=False), positions, False)
            simple, _ = stock(probs, info, positions, True)
            is_filtered = (info.top_ks != TOP_K_ALL) | (info.top_ps != 1.0)
            return torch.where(is_filtered, filtered, simple), None
        if info.need_min_p_sampling and get_exec().kernel.sampling_backend == "flashinfer":
            joint, _ = stock(probs.clone(), replace(info, need_min_p_sampling=False), positions, False)
            sequential, _ = stock(probs, info, positions, False)
            return torch.where(info.min_ps > 0, sequential, joint), None
        return stock(probs, info, positions, False)


def _one_by_one(info: Any) -> Any:
    """A batch's sampling parameters in which a custom processor visible one request at a time, as if it were alone."""
    alone = {
        (key, row): ProcessorEntry(entry.processor, [row], entry.indices[number : number + 1])
        for key, entry in info.custom_logit_processor.items()
        for number, row in enumerate(entry.rows)
    }
    return replace(info, custom_logit_processor=alone)
