"""Which requests of a batch are worked on together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_orthrus.sampling.request_groups import GREEDY, HEAD_ROWS, SAMPLED_ROWS, Way, pieces, way_of


def _params(**given: Any) -> Any:
    params = SamplingParams(**given)
    params.normalize(None)
    return params


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ({"temperature": 0.0}, GREEDY),
        ({"temperature": 0.8, "top_k": 1, "min_p": 0.2}, GREEDY),
        ({"temperature": 0.8}, Way(False)),
        ({"temperature": 1.0, "top_k": -1}, Way(False)),
        ({"temperature": 0.8, "top_p": 0.9}, Way(False, is_filtered=True)),
        ({"temperature": 0.8, "top_k": 20}, Way(False, is_filtered=True, has_top_k=True)),
        ({"temperature": 0.8, "min_p": 0.1}, Way(False, is_filtered=True, has_min_p=True)),
    ],
)
def test_a_request_chooses_as_if_it_were_alone(given: dict[str, Any], way: Way) -> None:
    assert way_of(_params(**given)) == way


def test_every_request_is_in_one_piece_and_pieces_are_bounded() -> None:
    kinds: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.9}, {"top_k": 1}, {"top_k": 5}, {}]
    params = [_params(temperature=1.0, **kinds[row % len(kinds)]) for row in range(128)]
    found = list(pieces(params, 32, "cpu"))
    assert sorted(request for piece in found for request in piece.requests) == list(range(128))
    numbers = torch.arange(128)
    for piece in found:
        assert numbers[piece.index].tolist() == list(piece.requests)
        assert {way_of(params[request]) for request in piece.requests} == {piece.way}
        assert len(piece.requests) * 32 <= (HEAD_ROWS if piece.way.is_greedy else SAMPLED_ROWS)
        assert piece.max_top_k == (5 if piece.way.has_top_k else None)


def test_requests_whose_logits_are_copied_are_in_small_groups_of_their_own() -> None:
    """One with penalties or log probabilities does not make its neighbours pay."""
    greedy = [SimpleNamespace(top_k=1)] * 16
    found = list(pieces(greedy, 32, "cpu", {3, 4, 5, 6, 7}))
    assert [piece.requests for piece in found if piece.is_costly] == [(3, 4, 5, 6), (7,)]
    assert [piece.requests for piece in found if not piece.is_costly] == [(0, 1, 2, 8, 9, 10, 11, 12, 13, 14, 15)]


def test_neighbours_are_sliced_and_copy_nothing() -> None:
    greedy = [SimpleNamespace(top_k=1)] * 5
    assert [piece.index for piece in pieces(greedy, 512, "cpu")] == [slice(row, row + 1) for row in range(5)]
    assert [piece.index for piece in pieces(greedy, 4, "cpu")] == [slice(0, 5)]


def test_a_block_wider_than_the_bound_is_a_piece_of_its_own() -> None:
    wide = [_params(temperature=1.0)] * 2
    assert [piece.requests for piece in pieces(wide, 4 * SAMPLED_ROWS, "cpu")] == [(0,), (1,)]
