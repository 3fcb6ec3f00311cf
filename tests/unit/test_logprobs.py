"""Log probabilities of a round: the right values, and no work for requests that want none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.logprob_processor import get_token_ids_logprobs, get_top_logprobs
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_orthrus.core import rows_index
from sglang_orthrus.sampling import logprobs as logprobs_module
from sglang_orthrus.sampling.logprobs import RoundLogprobs
from sglang_orthrus.sampling.request_groups import GREEDY, RequestGroup, SamplingKind

WIDTH, VOCAB = 4, 11
WANTS: list[dict[str, Any]] = [
    {"return_logprob": True, "top": 3},
    {"return_logprob": False, "top": 7},
    {"return_logprob": True, "top": 0, "ids": [4, 4, 9]},
    {"return_logprob": True, "top": VOCAB, "ids": [0]},
    {"return_logprob": True, "top": -1, "ids": []},
    {"return_logprob": False},
    {"return_logprob": True, "top": 3},
]


class Work(TorchDispatchMode):
    """Rows by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("topk", "_log_softmax"):
            self.rows.setdefault(name, []).append(args[0].numel() // args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def _batch(wants: list[dict[str, Any]]) -> Any:
    return SimpleNamespace(
        reqs=[SimpleNamespace(return_logprob=want["return_logprob"]) for want in wants],
        top_logprobs_nums=[want.get("top", 0) for want in wants],
        token_ids_logprobs=[want.get("ids") for want in wants],
        device="cpu",
    )


def _groups(size: int) -> list[RequestGroup]:
    """Greedy requests in two groups, and others in a third."""
    groups = [
        (GREEDY, range(0, size, 2)),
        (SamplingKind(False), range(1, size, 4)),
        (SamplingKind(False), range(3, size, 4)),
    ]
    return [RequestGroup(kind, tuple(rows), rows_index(list(rows), "cpu"), None) for kind, rows in groups if rows]


def _round(wants: list[dict[str, Any]]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """What SGLang gets, and the log probabilities of all rows and the tokens: [bs, Q, V], [bs, Q]."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(wants), WIDTH, VOCAB, generator=generator)
    logits[:, :, 5] = float("-inf")
    tokens = torch.randint(VOCAB, (len(wants), WIDTH), generator=generator)
    temperatures = torch.rand(len(wants), 1, generator=generator) + 0.5
    collected = RoundLogprobs(_batch(wants), WIDTH)
    expected = torch.empty_like(logits)
    for group in _groups(len(wants)):
        own = logits[group.index]
        scale = temperatures[group.index].repeat_interleave(WIDTH, dim=0)
        if collected.wants(group):
            scales = None if group.kind.is_greedy else scale
            collected.add(group, own.flatten(0, 1), scales, tokens[group.index])
        scaled = own if group.kind.is_greedy else own / temperatures[group.index][:, :, None]
        expected[group.index] = torch.log_softmax(scaled, dim=-1).clamp(min=torch.finfo(torch.float32).min)
    output = SimpleNamespace(next_token_top_logprobs_val=None, next_token_token_ids_logprobs_val=None)
    collected.write_to(output)
    return output, expected, tokens


def test_they_are_what_sglangs_own_functions_give() -> None:
    output, expected, tokens = _round(WANTS)
    rows = expected.flatten(0, 1)
    nums = [max(0, want.get("top", 0)) for want in WANTS for _ in range(WIDTH)]
    ids = [want.get("ids") for want in WANTS for _ in range(WIDTH)]
    top_values, top_ids = get_top_logprobs(rows, nums, no_copy_to_cpu=True)
    id_values, id_ids = get_token_ids_logprobs(rows, ids, no_copy_to_cpu=True)
    for request, want in enumerate(WANTS):
        if not want["return_logprob"]:
            continue
        chosen = expected[request].gather(1, tokens[request][:, None]).squeeze(1)
        assert torch.equal(output.next_token_logprobs[request], chosen)
        for row in range(request * WIDTH, (request + 1) * WIDTH):
            assert output.next_token_top_logprobs_val[row].tolist() == top_values[row].tolist()
            assert output.next_token_top_logprobs_idx[row].tolist() == top_ids[row].tolist()
            assert output.next_token_token_ids_logprobs_val[row].tolist() == id_values[row].tolist()
            assert output.next_token_token_ids_logprobs_idx[row] == id_ids[row]


def test_a_round_is_copied_to_the_host_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang copies every tensor that it finds in the lists."""
    copies: list[torch.Tensor] = []
    uploads: list[list[int]] = []

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor)
        return tensor

    def uploaded(args: list[int], **kwargs: Any) -> torch.Tensor:
        uploads.append(args)
        return torch.tensor(args, **kwargs)

    monkeypatch.setattr(logprobs_module, "async_d2h", copied)
    output, _, _ = _round(WANTS)
    assert len(copies) == 1
    lists = (
        output.next_token_top_logprobs_val,
        output.next_token_top_logprobs_idx,
        output.next_token_token_ids_logprobs_val,
    )
    for rows in lists:
        assert len(rows) == len(WANTS) * WIDTH
        assert not any(torch.is_tensor(row) for row in rows)
    # One group, whose index needs no upload: what is left are the ids, of two requests together.
    monkeypatch.setattr(logprobs_module, "async_h2d", uploaded)
    collected = RoundLogprobs(_batch([WANTS[2], WANTS[3]]), WIDTH)
    collected.add(
        RequestGroup(GREEDY, (0, 1), slice(0, 2), None),
        torch.randn(2 * WIDTH, VOCAB),
        None,
        torch.ones(2, WIDTH).long(),
    )
    assert uploads == [[4, 4, 9, 0]]


def test_rows_that_want_nothing_are_not_worked_on() -> None:
    """Of seven requests five want log probabilities, and three want the largest, two of them few."""
    with Work() as work:
        _round(WANTS)
    wanted = sum(want["return_logprob"] for want in WANTS)
    # The references of the test are one call for each of three groups.
    assert sum(work.rows["_log_softmax"]) == (len(WANTS) + wanted) * WIDTH
    assert sorted(work.rows["topk"]) == [WIDTH, 2 * WIDTH]


def test_less_than_none_is_none() -> None:
    """Other servers' word for all; SGLang asks whether the number is above 0."""
    output, _, _ = _round([{"return_logprob": True, "top": -1}] * 3)
    assert output.next_token_top_logprobs_val is None


def test_a_round_that_nobody_waits_for_has_rows_for_all() -> None:
    output = SimpleNamespace()
    RoundLogprobs(_batch(WANTS), WIDTH).write_to(output)
    assert len(output.next_token_top_logprobs_val) == len(WANTS) * WIDTH
    assert output.next_token_top_logprobs_val[0].tolist() == []
