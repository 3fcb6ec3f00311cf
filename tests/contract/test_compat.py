"""Every SGLang internal in the ledgers still exists with the parameters that we use."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.metadata import version
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_orthrus.compat import scheduler as compat
from sglang_orthrus.compat.accounting import ACCOUNTING_TOUCHES
from sglang_orthrus.compat.ledger import Touch
from sglang_orthrus.compat.memory_touches import MEMORY_TOUCHES
from sglang_orthrus.compat.reasoning_counts import TOKEN_COUNT_TOUCHES
from sglang_orthrus.compat.requests import REQUEST_LEDGER
from sglang_orthrus.compat.sampling_touches import SAMPLING_TOUCHES
from sglang_orthrus.compat.tool_streams import TOOL_STREAM_TOUCHES
from sglang_orthrus.cpu import replacements as cpu_patches
from sglang_orthrus.cpu.replacements import CPU_TOUCHES

TOUCHES = (
    *(*compat.LEDGER, *REQUEST_LEDGER, *SAMPLING_TOUCHES, *CPU_TOUCHES),
    *(*ACCOUNTING_TOUCHES, *MEMORY_TOUCHES, *TOOL_STREAM_TOUCHES, *TOKEN_COUNT_TOUCHES),
)
pytestmark = pytest.mark.contract


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return attrgetter(attribute)(importlib.import_module(module))


@pytest.mark.parametrize("touch", TOUCHES, ids=[touch.target for touch in TOUCHES])
def test_the_symbol_exists_with_our_parameters(touch: Touch) -> None:
    symbol = _resolve(touch.target)
    if touch.params:
        parameters = inspect.signature(symbol).parameters
        assert set(touch.params) <= set(parameters), f"{touch.target} has {list(parameters)}"


@pytest.mark.parametrize("touch", TOUCHES, ids=[touch.target for touch in TOUCHES])
def test_an_entry_says_what_why_and_until_when(touch: Touch) -> None:
    assert all((touch.what, touch.why, touch.remove_when))


def test_no_symbol_is_listed_twice() -> None:
    targets = [touch.target for touch in TOUCHES]
    assert len(targets) == len(set(targets))


def _own(ours: type, theirs: type) -> set[str]:
    """The methods of theirs that our class defines anew."""
    return {name for name, value in vars(ours).items() if callable(value) and hasattr(theirs, name)} - {"__init__"}


def test_the_graph_runner_overrides_what_its_entry_names() -> None:
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    from sglang_orthrus.passes.cuda_graphs import OrthrusGraphRunner

    (entry,) = (touch for touch in compat.LEDGER if touch.target.endswith(":DecodeCudaGraphRunner"))
    named = set(re.findall(r"\w+", entry.what)) - {"subclassed", "and", "are", "overridden"}
    assert named == _own(OrthrusGraphRunner, DecodeCudaGraphRunner)


def test_what_is_overridden_has_an_entry_of_its_own_or_is_named() -> None:
    """Of classes whose methods are listed one by one."""
    from sglang_orthrus.cpu.attention import OrthrusCpuAttnBackend
    from sglang_orthrus.cpu.kv_pool import CpuMHATokenToKVPool
    from sglang_orthrus.sampling.first_token import FirstTokenSampler

    for ours in (OrthrusCpuAttnBackend, CpuMHATokenToKVPool, FirstTokenSampler):
        (theirs,) = ours.__bases__
        listed = {
            touch.target.rsplit(".", 1)[1]
            for touch in TOUCHES
            if f":{theirs.__name__}." in touch.target
            and touch.what.startswith(("overridden", "extended", "subclassed"))
        }
        assert listed - {"__init__"} == _own(ours, theirs), ours


@pytest.mark.parametrize("target", cpu_patches.REPLACEMENTS)
def test_what_the_cpu_platform_replaces_has_an_entry(target: str) -> None:
    (entry,) = (touch for touch in cpu_patches.CPU_TOUCHES if touch.target == target)
    assert entry.what.startswith("replaced")


def test_the_installed_sglang_is_the_supported_one() -> None:
    compat.require_supported_sglang()


def test_another_sglang_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: "0.5.99")
    with pytest.raises(ValueError, match=rf"0\.5\.99.*pip install sglang=={version('sglang')}"):
        compat.require_supported_sglang()


def test_wrapping_twice_wraps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "validate_dllm_request", Scheduler.validate_dllm_request)
    compat.refuse_requests(lambda req: "no")
    wrapped = Scheduler.validate_dllm_request
    compat.refuse_requests(lambda req: "no")
    assert Scheduler.validate_dllm_request is wrapped


def test_rows_have_room_for_two_blocks_past_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache import allocation_sizing, kv_cache_configurator

    name = "get_req_to_token_extra_context_len"
    monkeypatch.setattr(kv_cache_configurator, name, lambda: 36)
    monkeypatch.setattr(allocation_sizing, "get_alloc_page_size", lambda: 16)
    compat.widen_req_to_token_rows(32)
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
    compat.continue_sessions_at_the_end()
    assert next_prompt() == [1, 2, 3, 9]


def test_the_delayed_part_of_a_round_is_fenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind it, and not where nothing was delayed."""
    from sglang.srt.managers.scheduler import Scheduler

    calls = list[str]()

    def launch(self: Any, batch_result: Any, cur_batch: Any) -> None:
        if batch_result is not None and batch_result.delay_sample_func is not None:
            calls.append(batch_result.delay_sample_func())
            batch_result.delay_sample_func = None

    monkeypatch.setattr(Scheduler, "launch_batch_sample_if_needed", launch)
    monkeypatch.setattr(Scheduler, "_apply_war_barrier", lambda self: calls.append("fence"))
    compat.fence_delayed_rounds()
    scheduler = object.__new__(Scheduler)
    for result in (None, SimpleNamespace(delay_sample_func=None), SimpleNamespace(delay_sample_func=lambda: "rest")):
        Scheduler.launch_batch_sample_if_needed(scheduler, result, None)
    assert calls == ["rest", "fence"]
