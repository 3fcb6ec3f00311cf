"""Reasoning tokens end where the text ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_orthrus.compat.stops import stop_at_first_match
from tests.patching import PATCHES, apply, load

pytestmark = pytest.mark.contract
END, THINK_END = 7, 9
# 40 tokens that think, the end of the reasoning, an answer, the end of the text.
OUTPUT = [*range(100, 140), THINK_END, 1, 2, END]


def finished(step: int, **sampling: Any) -> Any:
    """A request that thinks from its first token on, and got OUTPUT in steps of so many tokens."""
    parameters = SamplingParams(**{"max_new_tokens": 64, **sampling})
    parameters.normalize(None)
    request = Req("id", "", [1], parameters, eos_token_ids={END}, vocab_size=500)
    for start in range(0, len(OUTPUT), step):
        tokens = OUTPUT[start : start + step]
        request.output_ids.extend(tokens)
        request.update_reasoning_tokens(tokens, [THINK_END])
        request.update_finish_state(len(tokens))
        if request.finished():
            break
    return request


@pytest.mark.parametrize(
    "sampling",
    [{"max_new_tokens": 2}, {"stop_token_ids": [105]}, {"max_new_tokens": 42}, {}],
    ids=["length", "stop", "past the reasoning", "end of text"],
)
def test_a_round_counts_what_its_tokens_count_one_by_one(
    monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    expected = finished(1, **sampling)
    assert expected.reasoning_tokens <= len(expected.output_ids)
    monkeypatch.setattr(Req, "update_finish_state", Req.update_finish_state)
    stop_at_first_match()
    for step in (3, 32, len(OUTPUT)):
        got = finished(step, **sampling)
        assert got.reasoning_tokens == expected.reasoning_tokens
        assert len(got.output_ids_through_stop) == len(expected.output_ids)


def test_the_patched_streamer_cuts_it(tmp_path: Path) -> None:
    patch = PATCHES / "0016-reasoning-stops-where-the-text-stops.patch"
    module = load("patched_output_streamer", apply(patch, tmp_path)[0])
    accumulator: Any
    (accumulator,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "_beam_admits")
    )

    class Sent(Exception):
        pass

    class Request(SimpleNamespace):
        @property
        def send_token_offset(self) -> int:
            raise Sent

    request = Request(beam_group=None, finished=lambda: True, finished_output=None)
    request.finished_len, request.output_ids, request.reasoning_tokens = 2, OUTPUT, 33
    with pytest.raises(Sent):
        accumulator.accept(SimpleNamespace(), req=request)
    assert request.reasoning_tokens == 2
