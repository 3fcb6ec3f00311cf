"""What running requests have emitted, as far as their options depend on it.

The scheduler's own record lacks the last round under overlap scheduling.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.utils.common import async_h2d

from sglang_orthrus.core import Verdict
from sglang_orthrus.sampling.logit_adjustments import Adjustments, is_penalised, reads_output
from sglang_orthrus.sampling.penalties import TokenCounts


class History:
    """Keeps it from round to round.

    Token counts of penalised requests are on the device. Requests whose custom logit processors may read their output
    need it on the host, so a batch with such a request waits for every round's result.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._counts: TokenCounts | None = None
        self._outputs: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()

    def adjustments(self, batch: ScheduleBatch) -> Adjustments:
        """What the options of a decode batch do to logits."""
        return Adjustments(batch, self._counts, self._outputs)

    def resume(self, batch: ScheduleBatch) -> None:
        """Before prefill: penalise what retracted requests had emitted, which SGLang's penalizers forget."""
        info = batch.sampling_info
        for row, req in enumerate(batch.reqs):
            output = list(req.output_ids)
            if not output or info.acc_additive_penalties is None:
                continue
            params = req.sampling_params
            counts = async_h2d(output, dtype=torch.int64, device=self._device).bincount(minlength=info.vocab_size)
            occurs = counts > 0
            additive = info.acc_additive_penalties[row]
            if len(output) >= params.min_new_tokens:
                additive.zero_()  # it may stop now
            additive -= params.frequency_penalty * counts + params.presence_penalty * occurs
            if info.acc_scaling_penalties is not None:
                info.acc_scaling_penalties[row].masked_fill_(occurs, params.repetition_penalty)

    def start(self, batch: ScheduleBatch, first_tokens: torch.Tensor) -> None:
        """Prefill emits the first token, or the next one of a request that was retracted. first_tokens: [bs]"""
        penalised = [req for req in batch.reqs if is_penalised(req)]
        if penalised and self._counts is None:
            self._counts = TokenCounts(batch.sampling_info.vocab_size, self._device)
        if self._counts is not None:
            self._counts.start(penalised)
            for req in penalised:
                output = list(req.output_ids)
                if output:
                    tokens = async_h2d([output], dtype=torch.int64, device=self._device)
                    self._counts.add([req], tokens, torch.full((1,), len(output), device=self._device))
        readers = [row for row, req in enumerate(batch.reqs) if reads_output(req)]
        if readers:
            tokens = first_tokens.tolist()
            for row in readers:
                self._outputs[batch.reqs[row]] = [*batch.reqs[row].output_ids, tokens[row]]

    def extend(self, batch: ScheduleBatch, adjustments: Adjustments, block: torch.Tensor, verdict: Verdict) -> None:
        """A round ends. block: [bs, Q] int64"""
        if adjustments.are_penalised:
            assert self._counts is not None, "prefill makes the table"
            # The anchor and the accepted drafts come before the next anchor.
            self._counts.add(batch.reqs, block, verdict.accept_lens)
        if adjustments.read_outputs:
            emitted = zip(batch.reqs, verdict.tokens.tolist(), verdict.accept_lens.tolist(), strict=True)
            for req, tokens, length in emitted:
                if reads_output(req):
                    self._outputs[req].extend(tokens[:length])
