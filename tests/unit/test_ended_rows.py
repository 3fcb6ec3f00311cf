"""Requests that have ended in a round whose result the scheduler has not taken in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_orthrus.round.ended_rows import UnreadResults
from sglang_orthrus.round.wait_cost import KEPT, WaitCost

END, STOP = 2, 7


def request(num_tokens: int = 0, limit: int = 100, **sampling: Any) -> Any:
    """Whose text has so many tokens and takes so many at most."""
    wanted: dict[str, Any] = {"max_new_tokens": limit, "ignore_eos": False, "stop_token_ids": None} | sampling
    tokenizer = SimpleNamespace(eos_token_id=END, additional_stop_token_ids=None)
    return SimpleNamespace(
        sampling_params=SimpleNamespace(**wanted),
        output_ids=[1] * num_tokens,
        to_finish=None,
        eos_token_ids=set(),
        tokenizer=tokenizer,
    )


class Result:
    """On its way to the host until somebody waits for it."""

    def __init__(self, rows: list[list[int]], width: int) -> None:
        self.waits = 0
        self.copy_done = self
        self.next_token_ids = torch.tensor([[*row, *[END] * (width - len(row))] for row in rows]).flatten()
        self.accept_lens = torch.tensor([len(row) for row in rows], dtype=torch.int32)

    def synchronize(self) -> None:
        self.waits += 1


def test_texts_that_end_in_the_unread_result_are_left_out() -> None:
    cases = [
        (request(), [5, 6], True),
        (request(), [5, END, 6], False),
        (request(ignore_eos=True), [END], True),
        (request(8, limit=10), [5], True),
        (request(8, limit=10), [5, 6], False),
        (request(stop_token_ids={STOP}), [STOP], False),
        (request(), [STOP], True),
        (request(), [], True),
    ]
    reqs, result, unread = [req for req, _, _ in cases], Result([row for _, row, _ in cases], 4), UnreadResults()
    aborted, joined = request(), request()
    aborted.to_finish = "abort"
    unread.add([*reqs], result)
    expected = [row for row, (_, _, goes_on) in enumerate(cases) if goes_on]
    assert unread.running(reqs) == expected, "padding behind the accepted tokens ends no text"
    assert unread.running([joined, *reversed(reqs)]) == [0, *sorted(len(reqs) - row for row in expected)]
    assert result.waits == 2
    unread.add([aborted], Result([[5]], 1))
    assert unread.running([aborted, joined]) == [1]


def test_a_result_that_was_read_is_in_the_texts() -> None:
    req, unread = request(8, limit=10), UnreadResults()
    result = Result([[5]], 1)
    unread.add([req], result)
    unread.pop()
    req.output_ids.append(5)
    assert unread.running([req]) == [0] and not result.waits


def test_what_a_wait_costs_is_learnt_and_tried_again() -> None:
    cost = WaitCost()
    assert cost.seconds == 0.0, "the first one is tried"
    cost.observe(4e-3)
    assert cost.seconds == 4e-3
    for _ in range(30):
        cost.observe(1e-3)
    assert 1e-3 <= cost.seconds < 1.001e-3
    cost.fade()
    assert cost.seconds < 1e-3 * KEPT * 1.002
