"""Penalties at every position of a block, against SGLang's own penalizers fed one token at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.sampling import penaltylib

from sglang_orthrus.sampling.penalties import TABLE_ROWS, Penalties, TokenCounts, forbid_inplace, penalise_inplace
from tests.sampling import Peak, request

VOCAB, WIDTH = 12, 5


def _requests() -> list[Any]:
    options = [(0.0, 0.0, 1.0, 0), (0.7, 0.0, 1.0, 0), (0.0, 0.4, 1.0, 9), (0.0, 0.0, 1.3, 0), (0.5, -0.3, 0.8, 7)]
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=2)
    return [
        SimpleNamespace(
            sampling_params=SimpleNamespace(
                frequency_penalty=frequency,
                presence_penalty=presence,
                repetition_penalty=repetition,
                min_new_tokens=min_new,
                stop_token_ids={4},
            ),
            eos_token_ids={2},
            tokenizer=tokenizer,
        )
        for frequency, presence, repetition, min_new in options
    ]


def _by_sglang(reqs: list[Any], outputs: list[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """What plain SGLang makes of each request's logits after its output: [n, V]"""
    batch = SimpleNamespace(reqs=reqs, device="cpu")
    batch_ref: Any = type("Batch", (), {})()
    batch_ref.__dict__ = vars(batch)
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(
        VOCAB,
        batch_ref,
        {
            penaltylib.BatchedFrequencyPenalizer,
            penaltylib.BatchedPresencePenalizer,
            penaltylib.BatchedRepetitionPenalizer,
            penaltylib.BatchedMinNewTokensPenalizer,
        },
    )
    for tokens in zip(*outputs, strict=True):
        orchestrator.cumulate_output_tokens(torch.stack(tokens))
    additive = torch.zeros_like(logits)
    orchestrator.accumulate_additive_penalties(additive)
    logits = logits + additive
    scaling = orchestrator.accumulate_scaling_penalties()
    assert scaling is not None
    return torch.where(logits < 0, logits * scaling, logits / scaling)


def test_every_row_of_a_block_is_penalised_as_sglang_would_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    reqs = _requests()
    num = len(reqs)
    said = torch.randint(VOCAB, (num, 4), generator=generator)
    # Few token ids, so that a block repeats what was said and itself.
    block = torch.randint(5, (num, WIDTH), generator=generator)
    logits = torch.randn(num, WIDTH, VOCAB, generator=generator)

    counts = TokenCounts(VOCAB, "cpu")
    owners = [request({}) for _ in reqs]
    counts.start(owners)
    counts.add(owners, torch.full((num, 1), 3), torch.ones(num))
    counts.start(owners)
    counts.add(owners, torch.cat((said, block), dim=1), torch.full((num,), 4))
    params = [req.sampling_params for req in reqs]
    penalties = Penalties(
        *(torch.tensor([getattr(p, f"{name}_penalty") for p in params]) for name in Penalties.__dataclass_fields__)
    )
    visible = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    result = logits.clone()
    num_before = said.shape[1] + 1 + torch.arange(WIDTH).expand(num, -1)
    limits = torch.tensor([p.min_new_tokens for p in params])
    forbid_inplace(result, num_before, limits, torch.tensor([[2, 4, 2]] * num))
    penalise_inplace(result, counts.of(owners), block, visible, penalties)

    for row in range(WIDTH):
        outputs = torch.cat((said, block[:, : row + 1]), dim=1)
        expected = _by_sglang(reqs, list(outputs), logits[:, row])
        torch.testing.assert_close(result[:, row], expected)
    assert torch.equal(result[0], logits[0]), "a request without penalties among others"


def test_only_accepted_tokens_are_counted() -> None:
    reqs = [request({}) for _ in range(3)]
    counts = TokenCounts(VOCAB, "cpu")
    counts.start([reqs[2], reqs[0]])
    counts.add([reqs[2], reqs[1], reqs[0]], torch.tensor([[1, 1, 5], [4, 4, 4], [4, 4, 4]]), torch.tensor([2, 1, 3]))
    found = counts.of(reqs)
    assert found[2].nonzero().flatten().tolist() == [1] and int(found[2, 1]) == 2
    assert int(found[0, 4]) == 3
    assert int(found[1].sum()) == 0, "a request without penalties has no row"


def test_rows_are_those_of_penalised_requests_that_run() -> None:
    """At 2,048 requests with 151,936 tokens a row for every slot takes 1.2 GB, whoever is penalised."""
    counts = TokenCounts(VOCAB, "cpu")
    table = TABLE_ROWS * VOCAB * 4
    first = [request({}) for _ in range(TABLE_ROWS)]
    counts.start(first)
    assert counts.num_bytes == table
    counts.add(first, torch.ones(TABLE_ROWS, 1).long(), torch.ones(TABLE_ROWS))
    others = [request({}) for _ in range(TABLE_ROWS + 1)]
    counts.start(others)
    assert counts.num_bytes == 3 * table
    assert int(counts.of(others).sum()) == 0 and int(counts.of(first).sum()) == TABLE_ROWS
    # Ended, retracted, or nobody refers to them any more.
    others[0].has_ended = others[1].is_retracted = True
    del others[2:]
    newcomers = [request({}) for _ in range(TABLE_ROWS)]
    counts.start(newcomers)
    assert counts.num_bytes == 2 * table
    assert int(counts.of(newcomers).sum()) == 0 and int(counts.of(first).sum()) == TABLE_ROWS
    for req in (*first, *newcomers):
        req.has_ended = True
    counts.start([])
    assert counts.num_bytes == 0


def test_penalties_take_two_copies_of_the_logits_at_most() -> None:
    """The logits themselves are not among them; all-new ones at every step of the arithmetic were five more."""
    n, vocab_size = 4, 5000
    logits = torch.randn(n, WIDTH, vocab_size)
    penalties = Penalties(*(torch.full((n,), value) for value in (0.5, 0.2, 1.2)))
    counts = torch.randint(2, (n, vocab_size)).int()
    block, visible = torch.randint(vocab_size, (n, WIDTH)), torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    with Peak() as peak:
        penalise_inplace(logits, counts, block, visible, penalties)
    assert peak.bytes < 2 * logits.numel() * 4 + 6 * counts.numel() * 4
