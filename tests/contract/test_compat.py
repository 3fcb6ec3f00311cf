"""What is changed in SGLang at run time does what it says, and only once."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_orthrus.compat import versions
from sglang_orthrus.compat.grammars import begin_llguidance_behind_a_reasoning
from sglang_orthrus.compat.memory import widen_req_to_token_rows
from sglang_orthrus.compat.scheduler import DelayedPart, fence_delayed_rounds, refuse_requests
from sglang_orthrus.compat.stops import continue_sessions_at_the_end
from tests.contract.processes import output_of

pytestmark = pytest.mark.contract


def test_the_installed_sglang_is_the_supported_one() -> None:
    versions.require_supported_sglang()


def test_another_sglang_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.5.99")
    with pytest.raises(ValueError, match=rf"0\.5\.99.*pip install sglang=={version('sglang')}"):
        versions.require_supported_sglang()


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    """What `tests.contract.installing` tells of a process in which all that changes SGLang is installed."""
    found: dict[str, Any] = output_of("tests.contract.installing")
    return found


def test_every_wrapper_of_the_ledger_is_installed(installed: dict[str, Any]) -> None:
    is_wrapped = installed["wrapped"]
    assert len(is_wrapped) > 10 and set(is_wrapped.values()) == {True}, is_wrapped


def test_replacements_have_the_originals_signatures_and_reach_imports_by_name(installed: dict[str, Any]) -> None:
    assert installed["stock"] == installed["ours"]
    assert installed["installed"] and installed["by_name"]


def test_wrapping_twice_wraps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "validate_dllm_request", Scheduler.validate_dllm_request)
    refuse_requests(lambda req: "no")
    wrapped = Scheduler.validate_dllm_request
    refuse_requests(lambda req: "no")
    assert Scheduler.validate_dllm_request is wrapped


def test_rows_have_room_for_two_blocks_past_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache import allocation_sizing, kv_cache_configurator

    name = "get_req_to_token_extra_context_len"
    monkeypatch.setattr(kv_cache_configurator, name, lambda: 36)
    monkeypatch.setattr(allocation_sizing, "get_alloc_page_size", lambda: 16)
    widen_req_to_token_rows(32)
    assert getattr(kv_cache_configurator, name)() == 2 * 32 + 16 - 1


def test_a_session_s_next_prompt_ends_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.session.session_controller import Session

    def next_prompt() -> list[int]:
        last = SimpleNamespace(
            origin_input_ids=[1],
            origin_input_ids_unpadded=[1],
            output_ids=[2, 3, 4],
            finished_len=2,
            sampling_params=SimpleNamespace(max_new_tokens=8),
        )
        options = SimpleNamespace(drop_previous_output=False, offset=None)
        ids, unpadded = Session._concat_token_arrays(last, SimpleNamespace(input_ids=[9]), options)
        assert ids == unpadded and last.output_ids == [2, 3, 4]
        return list(ids)

    monkeypatch.setattr(Session, "_concat_token_arrays", staticmethod(Session._concat_token_arrays))
    assert next_prompt() == [1, 2, 3, 4, 9], "SGLang trims it now: drop the wrapper and the patch"
    continue_sessions_at_the_end()
    assert next_prompt() == [1, 2, 3, 9]


def test_a_delayed_pass_is_fenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind it, and not where nothing was delayed, or no forward pass."""
    from sglang.srt.managers.scheduler import Scheduler

    calls = list[str]()

    def launch(self: Any, batch_result: Any, cur_batch: Any) -> None:
        if batch_result is not None and batch_result.delay_sample_func is not None:
            calls.append(batch_result.delay_sample_func())
            batch_result.delay_sample_func = None

    monkeypatch.setattr(Scheduler, "launch_batch_sample_if_needed", launch)
    monkeypatch.setattr(Scheduler, "_apply_war_barrier", lambda self: calls.append("fence"))
    fence_delayed_rounds()
    scheduler = object.__new__(Scheduler)
    delayed = (
        None,
        lambda: "plain sampling",
        DelayedPart(lambda: "choice", runs_pass=False),
        DelayedPart(lambda: "pass", runs_pass=True),
    )
    for result in (None, *(SimpleNamespace(delay_sample_func=part) for part in delayed)):
        Scheduler.launch_batch_sample_if_needed(scheduler, result, None)
    assert calls == ["plain sampling", "choice", "pass", "fence"]


def test_a_grammar_that_fails_on_a_mask_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients choose grammars, and llguidance has limits. SGLang's fill of a single mask raises in the scheduler."""
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend, GuidanceGrammar

    from tests.unit.test_grammar_cursors import ENCODE, VOCABULARY, limited_grammar

    def fill(own: GuidanceGrammar) -> None:
        own.fill_vocab_mask(own.allocate_vocab_mask(VOCABULARY, 1, "cpu"), 0)

    with pytest.raises(ValueError, match="too many states"):
        fill(limited_grammar(100))
    monkeypatch.setattr(GuidanceGrammar, "fill_vocab_mask", GuidanceGrammar.fill_vocab_mask)
    monkeypatch.setattr(GuidanceBackend, "allocate_vocab_mask", None, raising=False)  # it adds none then
    begin_llguidance_behind_a_reasoning()
    failing = limited_grammar(100)
    fill(failing)
    fill(failing)
    with pytest.raises(ValueError, match="too many states"):
        failing.accept_token(ENCODE("a")[0])
