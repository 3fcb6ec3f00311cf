"""Which requests of a batch are worked on together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_orthrus.core import HEAD_ROWS
from sglang_orthrus.sampling.request_groups import (
    GREEDY,
    SAMPLED_ROWS,
    SamplingKind,
    greedy_groups,
    kind_of,
    request_groups,
)


def _params(**given: Any) -> Any:
    params = SamplingParams(**given)
    params.normalize(None)
    return params


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"temperature": 0.0}, GREEDY),
        ({"temperature": 0.8, "top_k": 1, "min_p": 0.2}, GREEDY),
        ({"temperature": 0.8}, SamplingKind(False)),
        ({"temperature": 1.0, "top_k": -1}, SamplingKind(False)),
        ({"temperature": 0.8, "top_p": 0.9}, SamplingKind(False, is_filtered=True)),
        ({"temperature": 0.8, "top_k": 20}, SamplingKind(False, is_filtered=True, has_top_k=True)),
        ({"temperature": 0.8, "min_p": 0.1}, SamplingKind(False, is_filtered=True, has_min_p=True)),
    ],
)
def test_a_request_chooses_as_if_it_were_alone(given: dict[str, Any], kind: SamplingKind) -> None:
    assert kind_of(_params(**given)) == kind


@pytest.mark.parametrize("width", [1, 8, 32])
def test_every_request_is_in_one_piece_and_pieces_are_bounded(width: int) -> None:
    kinds: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.9}, {"top_k": 1}, {"top_k": 5}, {}]
    params = [_params(temperature=1.0, **kinds[row % len(kinds)]) for row in range(128)]
    found = list(request_groups(params, width, "cpu"))
    assert sorted(request for group in found for request in group.requests) == list(range(128))
    numbers = torch.arange(128)
    for group in found:
        assert numbers[group.index].tolist() == list(group.requests)
        assert {kind_of(params[request]) for request in group.requests} == {group.kind}
        assert len(group.requests) * width <= (HEAD_ROWS if group.kind.is_greedy else SAMPLED_ROWS)
        assert group.max_top_k == (5 if group.kind.has_top_k else None)


def test_requests_whose_logits_are_copied_are_in_small_groups_of_their_own() -> None:
    """One with penalties or log probabilities does not make its neighbours pay."""
    greedy = [SimpleNamespace(top_k=1)] * 16
    found = list(request_groups(greedy, 32, "cpu", {3, 4, 5, 6, 7}))
    assert [group.requests for group in found if group.is_costly] == [(3, 4, 5, 6), (7,)]
    assert [group.requests for group in found if not group.is_costly] == [(0, 1, 2, 8, 9, 10, 11, 12, 13, 14, 15)]


def test_neighbours_are_sliced_and_copy_nothing() -> None:
    greedy = [SimpleNamespace(top_k=1)] * 5
    assert [group.index for group in request_groups(greedy, 512, "cpu")] == [slice(row, row + 1) for row in range(5)]
    assert [group.index for group in request_groups(greedy, 4, "cpu")] == [slice(0, 5)]


def test_a_block_wider_than_the_bound_is_a_piece_of_its_own() -> None:
    wide = [_params(temperature=1.0)] * 2
    assert [group.requests for group in request_groups(wide, 4 * SAMPLED_ROWS, "cpu")] == [(0,), (1,)]


@pytest.mark.parametrize("width", [1, 8, 32, 2 * HEAD_ROWS])
def test_greedy_groups_are_those_of_greedy_requests(width: int) -> None:
    greedy = [SimpleNamespace(top_k=1)] * 100
    assert list(greedy_groups(100, width, "cpu")) == list(request_groups(greedy, width, "cpu"))
