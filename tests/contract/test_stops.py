"""Of several stops in one round the first one ends the text, as it would if the tokens had come one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.managers import schedule_batch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.compat.stops import ends_with, stop_at_first_match
from tests.patching import PATCHES, apply, as_shipped, load

pytestmark = pytest.mark.contract

TOKENIZER = get_tokenizer(str(NANO))
END = TOKENIZER.eos_token_id
TEXT = [*TOKENIZER.encode("one two three"), END, *TOKENIZER.encode(" four\n five")]
CASES: dict[str, dict[str, Any]] = {
    "the string listed last comes first": {"stop": ["three", "two"]},
    "a string after the end of text": {"stop": ["\n"]},
    "a string before the end of text": {"stop": ["two"]},
    "a string after a stop token": {"stop": ["three"], "stop_token_ids": [TEXT[0]]},
    "a regex after the end of text": {"stop_regex": ["f[aeiou]"]},
    "a regex before a string": {"stop": ["three"], "stop_regex": ["t[wv]o"]},
    "a string beyond max_new_tokens": {"stop": ["four"], "ignore_eos": True, "max_new_tokens": 2},
    "the end of text alone": {"stop": ["nowhere"]},
    "nothing": {"stop": ["nowhere"], "ignore_eos": True},
}


def _request(request_class: Any, **sampling: Any) -> Any:
    parameters = SamplingParams(**{"max_new_tokens": 64, **sampling})
    parameters.normalize(TOKENIZER)
    request = request_class("id", "", [1], parameters, eos_token_ids={END}, vocab_size=TOKENIZER.vocab_size + 64)
    request.tokenizer = TOKENIZER
    return request


def finish(request_class: Any, sampling: dict[str, Any], step: int) -> tuple[Any, Any, int]:
    """Reason, its match, and length, of a request that gets TEXT in steps of so many tokens."""
    request = _request(request_class, **sampling)
    for start in range(0, len(TEXT), step):
        tokens = TEXT[start : start + step]
        request.output_ids.extend(tokens)
        request.update_finish_state(len(tokens))
        if request.finished():
            break
    reason = request.finished_reason
    return type(reason).__name__, getattr(reason, "matched", None), request.finished_len


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    request_class = schedule_batch.Req
    as_shipped(monkeypatch, request_class, "update_finish_state")
    stop_at_first_match()
    yield request_class


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = PATCHES / "0002-first-stop-of-an-accepted-run-wins.patch"
    [copy] = apply(patch, tmp_path_factory.mktemp("patched"))
    return load("patched_schedule_batch", Path(copy)).Req


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [2, 5, len(TEXT)])
@pytest.mark.parametrize("which", ["wrapped", "patched"])
def test_a_round_ends_where_single_tokens_would(
    request: pytest.FixtureRequest, which: str, step: int, case: str
) -> None:
    request_class = request.getfixturevalue(which)
    assert finish(request_class, CASES[case], step) == finish(request_class, CASES[case], 1)


def test_sglang_itself_takes_a_later_stop() -> None:
    """Otherwise the wrapper and the patch can go."""
    at_once = [finish(schedule_batch.Req, sampling, len(TEXT)) for sampling in CASES.values()]
    one_by_one = [finish(schedule_batch.Req, sampling, 1) for sampling in CASES.values()]
    assert at_once != one_by_one


def test_a_request_that_is_aborted_keeps_to_its_limit(wrapped: Any) -> None:
    """A round may run past it before the abort is seen."""
    request = _request(wrapped, max_new_tokens=3)
    request.to_finish = schedule_batch.FINISH_ABORT()
    request.output_ids.extend([5, 6, 7, 8, 9])
    request.update_finish_state(5)
    assert isinstance(request.finished_reason, schedule_batch.FINISH_ABORT)
    assert list(request.output_ids_through_stop) == [5, 6, 7]


@pytest.mark.parametrize("status", [None, 500])
def test_an_aborted_text_has_nothing_behind_a_stop_either(wrapped: Any, status: int | None) -> None:
    """The text ended before the abort was seen; an error still ends a request as an error."""
    request = _request(wrapped, stop=["two"])
    request.to_finish = schedule_batch.FINISH_ABORT(status_code=status)
    request.output_ids.extend(TEXT)
    request.update_finish_state(len(TEXT))
    if status is None:
        assert request.finished_reason.matched == "two"
        assert TOKENIZER.decode(request.output_ids_through_stop) == "one two"
    else:
        assert request.finished_reason.status_code == status


@pytest.mark.parametrize("sampling", [*CASES.values(), {"max_new_tokens": 3}, {"stop_token_ids": [TEXT[1]]}, {}])
def test_what_surely_ends_a_text_ends_it(wrapped: Any, sampling: dict[str, Any]) -> None:
    """Without strings, the other way round, too."""
    has_strings = bool({"stop", "stop_regex"} & set(sampling))
    found = set()
    for start in range(len(TEXT)):
        for stop in range(start + 1, len(TEXT) + 1):
            request = _request(wrapped, **sampling)
            request.output_ids.extend(TEXT[:start])
            run = TEXT[start:stop]
            expected = ends_with(request, run)
            assert not request.finished() and list(request.output_ids) == TEXT[:start], "it was only asked"
            request.output_ids.extend(run)
            request.update_finish_state(len(run))
            assert request.finished() or not expected
            assert request.finished() == expected or has_strings
            found.add(expected)
    assert found == {True, False} or sampling.get("ignore_eos")
