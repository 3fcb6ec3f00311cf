"""Acceptance against a loop that says what greedy decoding means."""

from __future__ import annotations

import torch

from sglang_orthrus.core import Verdict
from sglang_orthrus.sampling.acceptance import accept_bonus, accept_greedy, accept_nothing, in_a_row, spread


def _by_loop(block: list[int], predictions: list[int]) -> list[int]:
    """Emit predictions while the next block token agrees with the last one emitted."""
    emitted = [predictions[0]]
    for draft, prediction in zip(block[1:], predictions[1:], strict=True):
        if draft != emitted[-1]:
            break
        emitted.append(prediction)
    return emitted


def test_a_round_emits_what_greedy_decoding_would() -> None:
    generator = torch.Generator().manual_seed(0)
    # Three token ids, so that long and short agreements both occur.
    block = torch.randint(3, (500, 6), generator=generator)
    predictions = torch.randint(3, (500, 6), generator=generator)
    prefix_lens = torch.randint(1, 1000, (500,), generator=generator)
    verdict = accept_greedy(block, predictions, prefix_lens)
    for row in range(500):
        expected = _by_loop(block[row].tolist(), predictions[row].tolist())
        length = int(verdict.accept_lens[row])
        assert verdict.tokens[row, :length].tolist() == expected
        assert int(verdict.bonus[row]) == expected[-1]
        assert int(verdict.new_seq_lens[row]) == int(prefix_lens[row]) + len(expected)
    assert {1, 6} <= set(verdict.accept_lens.tolist()), "the sample must hold the shortest and the longest round"


def test_agreement_after_a_mismatch_is_not_accepted() -> None:
    verdict = accept_greedy(torch.tensor([[9, 1, 5, 3]]), torch.tensor([[1, 2, 3, 4]]), torch.tensor([10]))
    assert verdict.accept_lens.tolist() == [2]
    assert verdict.tokens[0, :2].tolist() == [1, 2]


def test_lengths_keep_the_dtype_that_the_scheduler_uses() -> None:
    verdict = accept_greedy(torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), torch.tensor([7], dtype=torch.int32))
    assert verdict.new_seq_lens.dtype == torch.int32
    assert verdict.accept_lens.dtype == torch.int32


def test_a_round_without_verification_ends_where_it_began() -> None:
    verdict = accept_nothing(torch.tensor([[9, 1, 5, 3], [8, 2, 2, 2]]), torch.tensor([10, 20]))
    assert verdict.accept_lens.tolist() == [1, 1]
    assert verdict.bonus.tolist() == verdict.tokens[:, 0].tolist() == [9, 8]
    assert verdict.new_seq_lens.tolist() == [11, 21]


def test_steps_in_a_row_commit_their_tokens_in_order() -> None:
    """The last one is the next round's anchor."""
    steps, lens = list[Verdict](), torch.tensor([10, 20], dtype=torch.int32)
    for tokens in ([1, 2], [3, 4], [5, 6]):
        steps.append(accept_bonus(torch.tensor(tokens), lens))
        lens = steps[-1].new_seq_lens
    verdict = in_a_row(steps)
    assert verdict.tokens.tolist() == [[1, 3, 5], [2, 4, 6]] and verdict.accept_lens.tolist() == [3, 3]
    assert verdict.bonus.tolist() == [5, 6] and verdict.new_seq_lens.tolist() == [13, 23]
    assert verdict.accept_lens.dtype == verdict.new_seq_lens.dtype == torch.int32


def test_nothing_is_committed_of_requests_that_were_left_out() -> None:
    anchors, lens = torch.tensor([9, 8, 7]), torch.tensor([10, 20, 30], dtype=torch.int32)
    own = accept_greedy(torch.tensor([[9, 1, 5], [7, 4, 2]]), torch.tensor([[1, 6, 0], [3, 0, 0]]), lens[[0, 2]])
    verdict = spread(own, [0, 2], anchors, lens)
    assert verdict.accept_lens.tolist() == [2, 0, 1] and verdict.accept_lens.dtype == own.accept_lens.dtype
    assert verdict.tokens.tolist() == [own.tokens[0].tolist(), [0, 0, 0], own.tokens[1].tolist()]
    assert verdict.bonus.tolist() == [6, 8, 3]
    assert verdict.new_seq_lens.tolist() == [12, 20, 31] and verdict.new_seq_lens.dtype == lens.dtype
    assert anchors.tolist() == [9, 8, 7] and lens.tolist() == [10, 20, 30], "the scheduler has these, too"
    nothing = spread(None, [], anchors, lens)
    assert nothing.accept_lens.tolist() == [0, 0, 0] and nothing.accept_lens.dtype == torch.int32
    assert nothing.bonus.tolist() == [9, 8, 7] and nothing.new_seq_lens.tolist() == [10, 20, 30]
