"""Log probabilities of the tokens that a round emits, in the form that SGLang's result processing expects."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.environ import envs
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.utils.common import async_d2h, async_h2d

from sglang_orthrus.compat.ledger import SHARED_BY_WORKERS, depends_on
from sglang_orthrus.core import rows_index
from sglang_orthrus.sampling.request_groups import RequestGroup

_NOTHING = np.empty(0, dtype=np.float32)


class _Table(NamedTuple):
    """Values of some requests' rows, on the device.

    Attributes:
        requests: [n] whose they are.
        values: [n * Q, k] fp32.
        ids: [n * Q, k] int64, the tokens that they belong to; None if the request named them.
    """

    requests: list[int]
    values: torch.Tensor
    ids: torch.Tensor | None


@depends_on(
    "sglang.srt.layers.logits_processor:LogitsProcessorOutput",
    "next_token_logprobs",
    "next_token_top_logprobs_val",
    "next_token_top_logprobs_idx",
    "next_token_token_ids_logprobs_val",
    "next_token_token_ids_logprobs_idx",
    what="filled with NumPy arrays",
    why="compute_spec_logprobs wants the logits of all rows at once: 2.5 GB for 128 blocks",
    until=SHARED_BY_WORKERS,
)
class RoundLogprobs:
    """Collects them group by group, of the requests that want them: SGLang's `compute_spec_logprobs` takes all logits.

    Args:
        batch: whose `return_logprob` is set.
        width: Q, rows per request.
    """

    def __init__(self, batch: ScheduleBatch, width: int) -> None:
        size = len(batch.reqs)
        self._width = width
        self._wanted = [bool(req.return_logprob) for req in batch.reqs]
        self._top = batch.top_logprobs_nums or [0] * size
        self._ids = batch.token_ids_logprobs or [None] * size
        self._chosen = torch.zeros(size, width, device=batch.device)
        self._tables: list[_Table] = []

    def wants(self, group: RequestGroup) -> bool:
        """Whether a request of the group asks for log probabilities."""
        return any(self._wanted[request] for request in group.requests)

    def add(
        self, group: RequestGroup, logits: torch.Tensor, temperatures: torch.Tensor | None, tokens: torch.Tensor
    ) -> None:
        """Take them from the rows of those requests of a group that want them.

        Args:
            logits: [r * Q, V], adjusted, not divided by temperatures.
            temperatures: [r * Q, 1]; None for greedy requests, whose temperature plain SGLang ignores.
            tokens: [r, Q] int64, emitted after each row.
        """
        numbers = [number for number, request in enumerate(group.requests) if self._wanted[request]]
        requests = [group.requests[number] for number in numbers]
        own = rows_index(numbers, logits.device)
        logits = logits.unflatten(0, tokens.shape)[own]
        if temperatures is not None and not envs.SGLANG_RETURN_ORIGINAL_LOGPROB.get():
            logits = logits / temperatures.unflatten(0, tokens.shape)[own]
        logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)
        index = group.index if len(requests) == len(group.requests) else rows_index(requests, logits.device)
        self._chosen[index] = logprobs.gather(2, tokens[own][:, :, None]).squeeze(2)
        self._add_top(requests, logprobs)
        self._add_ids(requests, logprobs)

    def _add_top(self, requests: list[int], logprobs: torch.Tensor) -> None:
        """The largest: nobody sorts for the number that another request asks for. logprobs: [n, Q, V]"""
        alike: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            if self._top[request] > 0:
                alike[self._top[request]].append(number)
        for count, numbers in alike.items():
            values, ids = logprobs[rows_index(numbers, logprobs.device)].flatten(0, 1).topk(count, dim=-1)
            self._tables.append(_Table([requests[number] for number in numbers], values, ids))

    def _add_ids(self, requests: list[int], logprobs: torch.Tensor) -> None:
        """Those of the tokens that requests name, copied to the device together. logprobs: [n, Q, V]"""
        named = [(number, self._ids[request]) for number, request in enumerate(requests) if self._ids[request]]
        if not named:
            return
        flat = async_h2d([token for _, ids in named for token in ids], dtype=torch.int64, device=logprobs.device)
        for (number, _), ids in zip(named, flat.split([len(ids) for _, ids in named]), strict=True):
            self._tables.append(_Table([requests[number]], logprobs[number][:, ids], None))

    def write_to(self, output: LogitsProcessorOutput) -> None:
        """Hand them to the scheduler, with one copy to the host for all rows.

        SGLang copies every tensor of its lists by itself, but leaves NumPy's arrays alone: these are views of the copy,
        which is complete when SGLang's own copies are.
        """
        rows = len(self._wanted) * self._width
        top_values, top_ids, ids_values = ([_NOTHING] * rows for _ in range(3))
        for table, values, ids in zip(self._tables, *self._on_host(), strict=True):
            own = [request * self._width + row for request in table.requests for row in range(self._width)]
            for number, row in enumerate(own):
                if ids is None:
                    ids_values[row] = values[number]
                else:
                    top_values[row], top_ids[row] = values[number], ids[number]
        result: dict[str, Any] = {"next_token_logprobs": self._chosen}
        if any(count > 0 for count in self._top):
            result |= {"next_token_top_logprobs_val": top_values, "next_token_top_logprobs_idx": top_ids}
        if any(ids is not None for ids in self._ids):
            named = [ids or [] for ids in self._ids for _ in range(self._width)]
            result |= {
                "next_token_token_ids_logprobs_val": ids_values,
                "next_token_token_ids_logprobs_idx": named,
            }
        for name, value in result.items():
            setattr(output, name, value)

    def _on_host(self) -> tuple[list[NDArray[Any]], list[NDArray[Any] | None]]:
        """The tables' values and ids, views of one buffer of 32-bit words."""
        words = []
        for table in self._tables:
            words.append(table.values.contiguous().view(torch.int32).flatten())
            if table.ids is not None:
                words.append(table.ids.int().flatten())
        if not words:
            return [], []
        parts = iter(np.split(async_d2h(torch.cat(words)).numpy(), np.cumsum([len(part) for part in words])[:-1]))
        values: list[NDArray[Any]] = []
        ids: list[NDArray[Any] | None] = []
        for table in self._tables:
            values.append(next(parts).view(np.float32).reshape(table.values.shape))
            ids.append(None if table.ids is None else next(parts).reshape(table.ids.shape))
        return values, ids
