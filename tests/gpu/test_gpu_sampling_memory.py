"""What choosing the tokens of many sampled requests takes on top of the model; on a CPU with a small vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_orthrus.core import HEAD_ROWS, Verdict
from sglang_orthrus.sampling.batch import BatchSampler
from sglang_orthrus.sampling.drafts import draft_tokens
from sglang_orthrus.sampling.logit_adjustments import Adjustments, is_penalised
from sglang_orthrus.sampling.logprobs import RoundLogprobs
from sglang_orthrus.sampling.memory import choosing_bytes
from sglang_orthrus.sampling.penalties import TokenCounts
from sglang_orthrus.sampling.request_groups import SAMPLED_ROWS
from sglang_orthrus.sampling.verification import verify_drafts
from tests.sampling import Peak, decode_batch

REQUESTS, WIDTH, HIDDEN = 128, 32, 64
# In units of one group's fp32 logits, [128, V]: some ten copies of them live at once, indices of a sort counting twice.
# All rows of the batch are 32 request_groups, so a path that is dense anywhere would take 32 and more.
BOUND = 16


class Head:
    """The model's head on hidden states, which is all that choosing asks of it; bf16 on a GPU, as there."""

    def __init__(self, vocab_size: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(HIDDEN, vocab_size, generator=generator) / 4
        self._weights = weights.to(device, torch.bfloat16 if device == "cuda" else torch.float32)

    def logits(self, hidden_states: torch.Tensor, *, in_fp32: bool = True) -> torch.Tensor:
        logits = hidden_states.flatten(0, -2).to(self._weights.dtype) @ self._weights
        return logits.float() if in_fp32 else logits


def choose(
    head: Head,
    options: list[dict[str, Any]],
    vocab_size: int,
    device: str,
    backend: str,
    top_logprobs: list[int | None] | None = None,
    width: int = WIDTH,
) -> Verdict:
    """One round of all requests. top_logprobs: how many each wants, None for no log probabilities."""
    generator = torch.Generator().manual_seed(1)
    requests = len(options)
    states = torch.randn(requests, width, HIDDEN, generator=generator).to(device)
    prefix_lens = torch.arange(requests, device=device)
    anchors = torch.zeros(requests, dtype=torch.int64, device=device)
    batch = decode_batch(options, prefix_lens, vocab_size=vocab_size, top_logprobs=top_logprobs)
    counts = TokenCounts(vocab_size, device)
    counts.start([req for req in batch.reqs if is_penalised(req)])
    sampler = BatchSampler(head, batch, anchors, Adjustments(batch, counts, {}), width, backend)
    # Row j of either view predicts the same token, so equal states accept every draft and others hardly any.
    drafts = draft_tokens(sampler, torch.where(torch.arange(width - 1, device=device)[:, None] < 5, states[:, :-1], 0))
    logprobs = RoundLogprobs(batch, width) if batch.return_logprob else None
    return verify_drafts(sampler, drafts, states, None, logprobs)


OPTIONS = [{"top_p": 0.9}, {"temperature": 0.8}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.05, "top_p": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_is_that_of_a_piece_on_a_cpu(options: dict[str, Any]) -> None:
    vocab_size = 3000
    head = Head(vocab_size, "cpu")
    torch.manual_seed(0)
    with Peak() as peak:
        lens = choose(head, [options] * REQUESTS, vocab_size, "cpu", "pytorch").accept_lens
    assert set(range(6, WIDTH)) & set(lens.tolist()), "drafts were accepted, and others rejected"
    assert lens.float().mean() < WIDTH / 2
    assert peak.bytes < BOUND * SAMPLED_ROWS * vocab_size * 4


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "bound"), [("flashinfer", BOUND), ("pytorch", 24)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_is_that_of_a_piece_on_a_gpu(options: dict[str, Any], backend: str, bound: int) -> None:
    """Below 1.25 GB; below 1.87 GB with `--sampling-backend pytorch`, whose sort has a workspace.

    One dense fp32 copy of the logits would take 2.49 GB, and choosing needs some ten.
    """
    vocab_size = 151936
    head = Head(vocab_size, "cuda")
    choose(
        head, [options] * REQUESTS, vocab_size, "cuda", backend
    )  # kernels are built, libraries take their workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lens = choose(head, [options] * REQUESTS, vocab_size, "cuda", backend).accept_lens
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{options} {backend}: {peak / 2**20:.0f} MiB")
    assert lens.float().mean() > 1.5
    assert peak < bound * SAMPLED_ROWS * vocab_size * 4


GREEDY: dict[str, Any] = {"temperature": 1.0, "top_k": 1}
# One of 48 greedy requests, and what it asks for.
ONE_ASKS: dict[str, tuple[dict[str, Any], int | None]] = {
    "penalty": ({"frequency_penalty": 0.5, "repetition_penalty": 1.2}, None),
    "penalty and top_logprobs": ({"frequency_penalty": 0.5, "repetition_penalty": 1.2}, 20),
    "top_logprobs": ({}, 20),
    "penalty, bias and top_logprobs": ({"presence_penalty": 0.5, "logit_bias": {"7": -5.0}}, 20),
}


def _one_of(requests: int, name: str | None) -> tuple[list[dict[str, Any]], list[int | None]]:
    options, top = ONE_ASKS[name] if name else ({}, None)
    at = requests // 2
    return (
        [GREEDY | (options if row == at else {}) for row in range(requests)],
        [top if row == at else None for row in range(requests)],
    )


@pytest.mark.parametrize("name", ONE_ASKS)
def test_one_request_with_options_does_not_make_its_neighbours_pay_on_a_cpu(name: str) -> None:
    """Their tokens stay, bit by bit, and so does the peak, which is that of one large greedy group."""
    vocab_size, requests = 3000, 48
    head = Head(vocab_size, "cpu")
    verdicts, peaks = [], []
    for which in (None, name):
        options, top = _one_of(requests, which)
        with Peak() as peak:
            verdicts.append(choose(head, options, vocab_size, "cpu", "pytorch", top))
        peaks.append(peak.bytes)
    others = [row for row in range(requests) if row != requests // 2]
    assert torch.equal(verdicts[0].tokens[others], verdicts[1].tokens[others])
    assert peaks[1] < peaks[0] + SAMPLED_ROWS * vocab_size * 4
    assert peaks[0] < 1.5 * HEAD_ROWS * vocab_size * 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ONE_ASKS)
def test_one_request_with_options_does_not_make_its_neighbours_pay_on_a_gpu(name: str) -> None:
    """Below 0.4 GB; all 512 rows of a group took 2.0 GB with a penalty and 2.3 with log probabilities as well."""
    vocab_size = 151936
    head = Head(vocab_size, "cuda")
    options, top = _one_of(48, name)
    choose(head, options, vocab_size, "cuda", "flashinfer", top)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    choose(head, options, vocab_size, "cuda", "flashinfer", top)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"one of 48 with {name}: {peak / 2**20:.0f} MiB")
    assert peak < 5 * SAMPLED_ROWS * vocab_size * 4


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flashinfer", "pytorch"])
def test_a_rehearsal_takes_what_a_full_batch_takes(backend: str) -> None:
    """What is named to SGLang before it sizes the KV pool covers every kind of request."""
    vocab_size = 151936
    head = Head(vocab_size, "cuda")
    named = choosing_bytes(WIDTH, vocab_size, backend, torch.bfloat16, "cuda", are_seeded=False)
    print(f"named, {backend}: {named / 2**20:.0f} MiB")
    for options in OPTIONS:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        choose(head, [options | {"presence_penalty": 0.5}] * 48, vocab_size, "cuda", backend, [20] * 48)
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
        print(f"{options}: {taken / 2**20:.0f} MiB")
        # Counts of 48 requests, their log probabilities and hidden states come on top.
        assert taken < named + 64 * vocab_size * 4 + 2**26
