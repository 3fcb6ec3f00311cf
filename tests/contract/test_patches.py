"""The upstream-ready diffs in patches/ apply to the installed SGLang and do what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.constrained import llguidance_backend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend, ReasonerGrammarObject
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.compat.grammars import begin_llguidance_behind_a_reasoning
from sglang_orthrus.cpu.kernels import murmur_hash32
from tests.patching import PATCHES, apply, installed_sglang, load

pytestmark = pytest.mark.contract

CUSTOM_SPEC_ALGO = PATCHES / "0001-custom-spec-algo-scheduler-methods.patch"


@pytest.mark.parametrize("patch", sorted(PATCHES.glob("*.patch")), ids=lambda patch: patch.stem)
def test_patch_applies_to_the_installed_sglang_and_is_listed(patch: Path, tmp_path: Path) -> None:
    copies = apply(patch, tmp_path)
    assert copies, "the patch touches no file"
    for copy in copies:
        assert copy.read_bytes() != (installed_sglang() / copy.relative_to(tmp_path / "sglang")).read_bytes()
    assert patch.name in (PATCHES / "README.md").read_text()


def test_custom_algorithms_get_what_the_scheduler_calls(tmp_path: Path) -> None:
    from sglang.srt.speculative import spec_registry
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    called = {name for name, member in vars(SpeculativeAlgorithm).items() if isinstance(member, FunctionType)}
    called = {name for name in called if not name.startswith("_")}
    assert called - set(dir(spec_registry.CustomSpecAlgo)), "SGLang has closed the gap: drop the patch"

    patched = load("patched_spec_registry", apply(CUSTOM_SPEC_ALGO, tmp_path)[0])
    assert called <= set(dir(patched.CustomSpecAlgo))
    patched._assert_custom_spec_algo_conforms(patched.CustomSpecAlgo)
    with pytest.raises(TypeError, match=r"create_future_map.*need_topk"):
        patched._assert_custom_spec_algo_conforms(spec_registry.CustomSpecAlgo)

    algorithm = patched.CustomSpecAlgo("ANY", lambda server_args: object)
    assert algorithm.carries_draft_hidden_states() is False
    assert algorithm.need_topk() is False
    assert algorithm.get_platform_worker_cls() is None


def test_min_p_with_a_seed_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shipped, the assertion ends the scheduler."""
    from sglang.srt.layers import sampler

    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).repeat(64, 1)
    rows = torch.ones(64)
    arguments = probs, (rows * 4).int(), rows, rows * 0.25, True, torch.arange(64), torch.arange(64)
    with pytest.raises(AssertionError, match="wrong results"):
        sampler.top_k_top_p_min_p_sampling_from_probs_torch(*arguments)

    patched = load("patched_sampler", apply(PATCHES / "0004-min-p-with-a-seed.patch", tmp_path)[0])
    monkeypatch.setattr(patched, "murmur_hash32", murmur_hash32)
    tokens = patched.top_k_top_p_min_p_sampling_from_probs_torch(*arguments)
    assert set(tokens.tolist()) == {0, 1, 2}, "0.05 is below a quarter of 0.5"
    # Weights need not sum to 1: twice as large, they give the same tokens.
    doubled = torch.where(probs < 0.1, 0, 2 * probs).log()
    seeds, positions = arguments[-2:]
    assert torch.equal(tokens, patched.multinomial_with_seed(doubled, seeds, positions).view(-1).int())


def test_penalizers_are_fed_at_forward_entry_under_overlap(tmp_path: Path) -> None:
    """`test_adjustments.py` shows the lag of plain SGLang, and the patched one without it, on servers."""
    apply(PATCHES / "0005-penalties-under-overlap.patch", tmp_path)
    schedule_batch: Any = load("patched_schedule_batch", tmp_path / "sglang/srt/managers/schedule_batch.py")

    class Reached(Exception):
        pass

    def prepare(**options: bool) -> int:
        fed: list[int] = []

        def allocate(*args: object, **kwargs: object) -> None:
            raise Reached

        schedule_batch.alloc_for_decode = allocate
        batch = SimpleNamespace(
            spec_algorithm=SimpleNamespace(is_none=lambda: True),
            sampling_info=SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=True)),
            cumulate_penalty_output_tokens=lambda: fed.append(1),
            model_config=SimpleNamespace(is_encoder_decoder=False),
            reqs=[],
        )
        for name in ("strip_beam_tail", "append_beam_tail"):
            setattr(schedule_batch, name, lambda batch: None)
        with pytest.raises(Reached):
            schedule_batch.ScheduleBatch.prepare_for_decode(batch, **options)
        return len(fed)

    assert prepare() == 1
    assert prepare(penalize_at_forward=True) == 0


def test_dflash_penalties_do_something(tmp_path: Path) -> None:
    from sglang.srt.speculative import dflash_utils

    patched = load("patched_dflash_utils", apply(PATCHES / "0006-dflash-penalties.patch", tmp_path)[0])

    class Info:
        has_custom_logit_processor = False
        penalizer_orchestrator = grammar_mask = logit_bias = None
        acc_additive_penalties = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, -2.0]])
        acc_scaling_penalties = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])

        def __len__(self) -> int:
            return 2

    def adjusted(module: ModuleType) -> list[list[float]]:
        logits = torch.full((4, 3), 4.0)
        module.apply_dflash_verify_logits_adjustments(next_token_logits=logits, sampling_info=Info(), draft_token_num=2)
        return logits.tolist()

    assert adjusted(dflash_utils) == [[4.0, 4.0, 4.0]] * 4, "SGLang has closed the gap: drop the patch"
    assert adjusted(patched) == [[2.0, 3.0, 4.0]] * 2 + [[4.0, 4.0, 2.0]] * 2


def test_llguidance_begins_behind_a_reasoning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shipped, every grammar gets a 400. `compat` does without the patch, on a copy here.

    `test_grammar_setups.py` compares answers on a patched plain server.
    """
    tokenizer = get_tokenizer(str(NANO))
    end, think_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</think>"])

    def grammar_of(module: ModuleType) -> ReasonerGrammarObject:
        backend = module.GuidanceBackend(tokenizer, n_vocab=4096, eos_token_ids=[end])
        reasoner = ReasonerGrammarBackend(backend, ReasoningParser("qwen3"), tokenizer)
        return reasoner._init_value_dispatch(("regex", "[ab]"), True)

    with pytest.raises(AttributeError, match="allocate_vocab_mask"):
        grammar_of(llguidance_backend)

    patched = load("patched_llguidance", apply(PATCHES / "0008-llguidance-behind-a-reasoning.patch", tmp_path)[0])
    completed = load("completed_llguidance", Path(str(llguidance_backend.__file__)))
    monkeypatch.setitem(sys.modules, llguidance_backend.__name__, completed)
    begin_llguidance_behind_a_reasoning()
    for module in (patched, completed):
        grammar = grammar_of(module)
        masks = grammar.allocate_vocab_mask_fn(4096, 3, "cpu")
        masks.fill_(-1)
        grammar.fill_vocab_mask(masks, 0)
        grammar.accept_token(think_end)
        grammar.fill_vocab_mask(masks, 1)
        with pytest.raises(ValueError):
            grammar.accept_token(end)
        grammar.fill_vocab_mask(masks, 2)
        logits = torch.zeros(3, 4096)
        grammar.apply_vocab_mask_fn(logits, grammar.move_vocab_mask_fn(masks, "cpu"))
        a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
        assert logits.isfinite().sum(dim=1).tolist() == [4096, 2, 4096]
        assert logits[1, [a, b]].isfinite().all()
