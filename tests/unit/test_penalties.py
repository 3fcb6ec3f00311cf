"""Penalties at every position of a block, against SGLang's own penalizers fed one token at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.sampling import penaltylib

from sglang_orthrus.penalties import Penalties, TokenCounts, forbid_inplace, penalise_inplace

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

    table = TokenCounts(8, VOCAB, "cpu")
    rows = torch.tensor([5, 1, 7, 0, 2])
    table.add(rows, torch.full((num, 1), 3), torch.ones(num))
    table.reset(rows)
    table.add(rows, torch.cat((said, block), dim=1), torch.full((num,), 4))
    params = [req.sampling_params for req in reqs]
    penalties = Penalties(
        *(torch.tensor([getattr(p, f"{name}_penalty") for p in params]) for name in Penalties.__dataclass_fields__)
    )
    sees = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    result = logits.clone()
    num_before = said.shape[1] + 1 + torch.arange(WIDTH).expand(num, -1)
    limits = torch.tensor([p.min_new_tokens for p in params])
    forbid_inplace(result, num_before, limits, torch.tensor([[2, 4, 2]] * num))
    penalise_inplace(result, table.of(rows), block, sees, penalties)

    for row in range(WIDTH):
        outputs = torch.cat((said, block[:, : row + 1]), dim=1)
        expected = _by_sglang(reqs, list(outputs), logits[:, row])
        torch.testing.assert_close(result[:, row], expected)
    assert torch.equal(result[0], logits[0]), "a request without penalties among others"


def test_only_accepted_tokens_are_counted() -> None:
    table = TokenCounts(3, VOCAB, "cpu")
    table.add(torch.tensor([2, 0]), torch.tensor([[1, 1, 5], [4, 4, 4]]), torch.tensor([2, 3]))
    counts = table.of(torch.tensor([0, 1, 2]))
    assert counts[2].nonzero().flatten().tolist() == [1] and int(counts[2, 1]) == 2
    assert int(counts[0, 4]) == 3 and int(counts[1].sum()) == 0
