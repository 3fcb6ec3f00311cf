"""What a request's options do to its logits before a token is chosen, at every position of a block.

The order is plain SGLang's: additive penalties, scaling, grammar mask, bias, custom processors, NaN handling. Options
that leave no token give way (see `nothing_left`).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling.sampling_batch_info import ProcessorEntry
from sglang.srt.utils.async_probe import sanitize_nan_logits
from sglang.srt.utils.common import async_h2d

from sglang_orthrus.compat.ledger import SHARED_BY_SAMPLERS, depends_on
from sglang_orthrus.core import rows_index
from sglang_orthrus.sampling.nothing_left import leave_something_inplace, tame_inplace, within_the_grammar
from sglang_orthrus.sampling.penalties import Penalties, TokenCounts, forbid_inplace, penalise_inplace
from sglang_orthrus.sampling.request_groups import RequestGroup

REQUEST_KEY = "__req__"  # where SGLang puts the request for custom processors


class RowContext(NamedTuple):
    """Where in the output rows of logits stand.

    Attributes:
        tokens: [bs, K] int64, the anchor and what follows it.
        visible: [W, K] bool, which of these come before the token that a row chooses; at least the anchor.
        offsets: [W], or [bs, W] if they differ between requests: positions after the anchor's.
        host_tokens: the tokens, if custom processors read them.
    """

    tokens: torch.Tensor
    visible: torch.Tensor
    offsets: torch.Tensor
    host_tokens: list[list[int]] | None = None


class RowMasks(NamedTuple):
    """What grammars allow in a block.

    Attributes:
        mask: [R * W, ...], W rows for every constrained request.
        requests: [R] their rows in the batch, ascending.
    """

    mask: GrammarMask
    requests: Sequence[int]


def is_penalised(req: Any) -> bool:
    """Whether a request's output changes the logits of its next tokens."""
    params = req.sampling_params
    return bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0)


def is_adjusted(req: Any) -> bool:
    """Whether any option of a request does more to its logits than to forbid tokens, as grammars do."""
    params = req.sampling_params
    return bool(
        is_penalised(req) or params.min_new_tokens > 0 or params.logit_bias or req.custom_logit_processor is not None
    )


def reads_output(req: Any) -> bool:
    """Whether a custom logit processor of the request may look at its output."""
    return req.custom_logit_processor is not None and isinstance(req.sampling_params.custom_params, dict)


def may_forbid(req: Any) -> bool:
    """Whether options of the request, besides its grammar, can forbid tokens from here on."""
    params = req.sampling_params
    # Under overlap scheduling output_ids lags behind by a round, which only makes this true for longer.
    return bool(
        params.logit_bias
        or req.custom_logit_processor is not None
        or (params.min_new_tokens > 0 and params.min_new_tokens > len(req.output_ids))
    )


@depends_on(
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.copy_for_forward",
    what="whether it returns acc_additive_penalties or acc_scaling_penalties says whether a request is penalised",
    why="the penalizers stay with the scheduler, and these sums are one constant per block and a round late",
    until="SGLang penalises per position",
)
def are_adjusted(info: Any) -> bool:
    """Whether any request of a batch is adjusted. info: SGLang's `SamplingBatchInfo`."""
    return bool(
        info.has_custom_logit_processor
        or info.logit_bias is not None
        or info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None
    )


@depends_on(
    "sglang.srt.layers.sampler:apply_custom_logit_processor",
    "logits",
    "sampling_batch_info",
    what="called with every row of a block as a request of its own",
    why="SGLang's speculative workers do so",
    until=SHARED_BY_SAMPLERS,
)
@depends_on(
    "sglang.srt.sampling.sampling_batch_info:ProcessorEntry",
    "processor",
    "rows",
    "indices",
    what="constructed for some rows of a batch",
    why="it is the form of custom processors in a batch",
    until=SHARED_BY_SAMPLERS,
)
@depends_on(
    "sglang.srt.utils.async_probe:sanitize_nan_logits",
    "logits",
    "msg",
    what="called before a token is chosen",
    why="SGLang's sampler does so",
    until=SHARED_BY_SAMPLERS,
)
class Adjustments:
    """The options of a batch's requests that change logits.

    Args:
        batch: in a decode round.
        counts: of the requests' outputs before their anchors; needed if one of them is penalised.
        outputs: of the requests whose custom processors read it, the output up to the anchor.

    Attributes:
        requests: rows of those that have such options.
    """

    def __init__(self, batch: ScheduleBatch, counts: TokenCounts | None, outputs: Mapping[Any, list[int]]) -> None:
        self._batch = batch
        self._info = batch.sampling_info
        self._counts = counts
        self._outputs = outputs
        self._prefix_lens = batch.seq_lens
        self._penalties = self._min_new = None
        are_some = are_adjusted(self._info)
        self.requests = frozenset(row for row, req in enumerate(batch.reqs) if are_some and is_adjusted(req))
        if self._info.acc_additive_penalties is not None or self._info.acc_scaling_penalties is not None:
            if any(map(is_penalised, batch.reqs)):
                self._penalties = _penalties(batch)
            if any(req.sampling_params.min_new_tokens > 0 for req in batch.reqs):
                self._min_new = _MinNew.of(batch)

    @property
    def are_penalised(self) -> bool:
        """Whether any request is."""
        return self._penalties is not None

    @property
    def read_outputs(self) -> bool:
        """Whether the custom processor of any request may."""
        return self._info.has_custom_logit_processor and any(map(reads_output, self._batch.reqs))

    def apply_inplace(
        self, logits: torch.Tensor, group: RequestGroup, context: RowContext, masks: RowMasks | None = None
    ) -> None:
        """Change the logits of a group's rows. logits: [r, W, V], fp32 if the group is costly"""
        index = group.index
        is_adjusted_here = not self.requests.isdisjoint(group.requests)
        allowed = _Allowed.of(self._batch.reqs, group, logits) if is_adjusted_here else None
        if is_adjusted_here and self._min_new is not None:
            num_before = self._min_new.num_before(self._prefix_lens, context)
            forbid_inplace(logits, num_before[index], self._min_new.limits[index], self._min_new.stops[index])
        if is_adjusted_here and self._penalties is not None:
            assert self._counts is not None, "prefill makes them"
            counts = self._counts.of([self._batch.reqs[request] for request in group.requests])
            penalise_inplace(logits, counts, context.tokens[index], context.visible, self._penalties.at(index))
        if masks is not None:
            _mask_inplace(logits, group.requests, masks)
        if is_adjusted_here and self._info.logit_bias is not None:
            logits.add_(self._info.logit_bias[index][:, None, :])
        if is_adjusted_here and self._info.has_custom_logit_processor:
            self._process(logits, group, context)
        if allowed is not None:
            allowed.take_over_inplace(logits, masks)
        if masks is not None and not group.kind.is_greedy:
            leave_something_inplace(logits)
        sanitize_nan_logits(logits.flatten(0, 1), "ORTHRUS: logits")

    def _process(self, logits: torch.Tensor, group: RequestGroup, context: RowContext) -> None:
        """Custom processors see every row as if it were a request of its own, and no other request's."""
        width = logits.shape[1]
        params = [self._params(request, row, context) for request in group.requests for row in range(width)]
        entries = {}
        for key, entry in self._info.custom_logit_processor.items():
            members = set(entry.rows)
            for number, request in enumerate(group.requests):
                if request in members:
                    rows = list(range(number * width, (number + 1) * width))
                    indices = torch.arange(rows[0], rows[-1] + 1, device=logits.device)
                    entries[key, request] = ProcessorEntry(entry.processor, rows, indices)
        if entries:
            apply_custom_logit_processor(logits.flatten(0, 1), _Rows(entries, params))
            tame_inplace(logits)

    def _params(self, request: int, row: int, context: RowContext) -> Any:
        params = self._info.custom_params[request]
        if context.host_tokens is None or not isinstance(params, dict) or REQUEST_KEY not in params:
            return params
        req = self._batch.reqs[request]
        # Of the block the anchor is the first token, which the outputs have already.
        drafted = context.host_tokens[request][1 : min(row + 1, context.visible.shape[1])]
        return params | {REQUEST_KEY: _RequestAt(req, array("q", [*self._outputs[req], *drafted]))}


@dataclass(frozen=True, slots=True)
class _Allowed:
    """What grammars alone allow the requests of a group whose options may forbid every token.

    Attributes:
        requests: their rows in the batch.
        index: their rows in the group.
        logits: [n, W, V], before any option.
    """

    requests: tuple[int, ...]
    index: torch.Tensor | slice
    logits: torch.Tensor

    @classmethod
    def of(cls, reqs: Sequence[Any], group: RequestGroup, logits: torch.Tensor) -> _Allowed | None:
        """None if no request of the group is one."""
        numbers = [number for number, request in enumerate(group.requests) if may_forbid(reqs[request])]
        if not numbers:
            return None
        index = rows_index(numbers, logits.device)
        return cls(tuple(group.requests[number] for number in numbers), index, logits[index].clone())

    def take_over_inplace(self, logits: torch.Tensor, masks: RowMasks | None) -> None:
        """Replace the rows that forbid every token. logits: [r, W, V], adjusted."""
        if masks is not None:
            _mask_inplace(self.logits, self.requests, masks)
        logits[self.index] = within_the_grammar(logits[self.index], self.logits)


def _mask_inplace(logits: torch.Tensor, requests: Sequence[int], masks: RowMasks) -> None:
    slots = {request: slot for slot, request in enumerate(masks.requests)}
    own = [(number, slots[request]) for number, request in enumerate(requests) if request in slots]
    if not own:
        return
    numbers, rows = (rows_index(indices, logits.device) for indices in zip(*own, strict=True))
    allowed = masks.mask.vocab_mask.unflatten(0, (-1, logits.shape[1]))[rows]
    constrained = logits[numbers]
    masks.mask._replace(vocab_mask=allowed.flatten(0, 1)).apply(constrained.flatten(0, 1))
    if isinstance(numbers, torch.Tensor):  # a slice is a view
        logits[numbers] = constrained


@dataclass(frozen=True, slots=True)
class _Rows:
    """What `apply_custom_logit_processor` reads of a batch."""

    custom_logit_processor: dict[Any, ProcessorEntry]
    custom_params: list[Any]

    def __len__(self) -> int:
        return len(self.custom_params)


class _RequestAt:
    """A request as it would be at a position that is not committed yet."""

    def __init__(self, req: Any, output_ids: array[int]) -> None:
        self._req = req
        self.output_ids = output_ids

    def __getattr__(self, name: str) -> Any:
        # A processor is the user's code: it may read anything of a request.
        return getattr(self._req, name)


@dataclass(frozen=True, slots=True)
class _MinNew:
    """`min_new_tokens` of a batch: limits [bs], stops [bs, S], input_lens [bs], all int64."""

    limits: torch.Tensor
    stops: torch.Tensor
    input_lens: torch.Tensor

    @classmethod
    def of(cls, batch: ScheduleBatch) -> _MinNew:
        vocab_size = batch.sampling_info.vocab_size
        stops = [[token for token in _stop_ids(req) if 0 <= token < vocab_size] for req in batch.reqs]
        limits = [req.sampling_params.min_new_tokens if ids else 0 for req, ids in zip(batch.reqs, stops, strict=True)]
        longest = max(map(len, stops)) or 1
        # Rows are filled up with stops of their own, which changes nothing.
        padded = [(ids or [0]) + (ids[:1] or [0]) * (longest - max(len(ids), 1)) for ids in stops]
        lens = [len(req.origin_input_ids) for req in batch.reqs]
        return cls(*(async_h2d(list(x), dtype=torch.int64, device=batch.device) for x in (limits, padded, lens)))

    def num_before(self, prefix_lens: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Tokens emitted before the one that a row chooses, [bs, W]: C tokens and the anchor, less the input."""
        return (prefix_lens.long() + 1 - self.input_lens)[:, None] + context.offsets


def _stop_ids(req: Any) -> set[int]:
    """The tokens that `min_new_tokens` holds back, as SGLang's `BatchedMinNewTokensPenalizer` collects them."""
    tokenizer = req.tokenizer
    sources = (
        req.sampling_params.stop_token_ids,
        req.eos_token_ids,
        tokenizer.additional_stop_token_ids,
        (tokenizer.eos_token_id,),
    )
    return {token for source in sources for token in source or () if token is not None}


def _penalties(batch: ScheduleBatch) -> Penalties:
    params = [req.sampling_params for req in batch.reqs]
    names = ("frequency_penalty", "presence_penalty", "repetition_penalty")
    return Penalties(
        *(async_h2d([getattr(p, name) for p in params], dtype=torch.float32, device=batch.device) for name in names)
    )
