"""The reference against Transformers' Qwen3 and against step-by-step decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.common.reference import Reference, State, top2_gap
from sglang_orthrus.models.checkpoint import export_ar
from tests.fixtures import Shape, write_checkpoint

PROMPT = [7, 3, 101, 64, 250, 9, 9, 31, 180, 77, 12]
BLOCK = Shape().block


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), Shape(tied=request.param))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def copy_ar_into_diff(reference: Reference) -> None:
    for name in [name for name in reference.weights if "_diff." in name]:
        reference.weights[name] = reference.weights[name.replace("_diff.", ".")]


def transformers_logits(checkpoint: Path, target: Path, ids: list[int], mask: Tensor | None = None) -> Tensor:
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(
        export_ar(checkpoint, target), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return model(torch.tensor([ids]), attention_mask=mask).logits[0]


def test_ar_view_is_transformers_qwen3(checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    expected = transformers_logits(checkpoint, tmp_path / "ar", PROMPT)
    torch.testing.assert_close(reference.ar_logits(PROMPT), expected, rtol=1e-4, atol=1e-4)


def test_diffusion_view_is_qwen3_with_a_bidirectional_block(checkpoint: Path, tmp_path: Path) -> None:
    """With the AR weights in both views, the block is a plain Qwen3 whose last rows see each other."""
    reference = Reference(checkpoint)
    copy_ar_into_diff(reference)
    prefix, anchor = PROMPT[:-1], PROMPT[-1]
    ids = [*prefix, anchor] + [reference.mask_id] * (BLOCK - 1)
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    mask[len(prefix) :] = 0
    expected = transformers_logits(checkpoint, tmp_path / "ar", ids, mask[None, None])[len(prefix) :]
    torch.testing.assert_close(reference.diff_logits(prefix, anchor), expected, rtol=1e-4, atol=1e-4)


def test_diffusion_view_reads_every_diff_tensor_and_ar_view_none(checkpoint: Path) -> None:
    reference = Reference(checkpoint)
    ar, diff = reference.ar_logits(PROMPT), reference.diff_logits(PROMPT, 5)
    names = [name for name in reference.weights if "_diff." in name]
    assert len(names) == 6 * reference.layers
    for name in names:
        original = reference.weights[name]
        reference.weights[name] = original.roll(1, 0)
        assert not torch.allclose(reference.diff_logits(PROMPT, 5), diff, atol=1e-3), name
        assert torch.equal(reference.ar_logits(PROMPT), ar), name
        reference.weights[name] = original


def test_incremental_and_whole_prefix_agree(reference: Reference) -> None:
    state = reference.new_state()
    parts = [reference.extend(state, PROMPT[:4]), reference.extend(state, PROMPT[4:])]
    torch.testing.assert_close(torch.cat(parts), reference.ar_logits(PROMPT), rtol=1e-4, atol=1e-4)
    state.crop(6)
    whole = reference.diff_logits(PROMPT[:6], 5)
    torch.testing.assert_close(reference.draft_logits(state, 5), whole, rtol=1e-4, atol=1e-4)
    assert state.length == 6


def greedy(reference: Reference, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(reference.ar_logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_rounds_yield_the_greedy_continuation(reference: Reference) -> None:
    trace = reference.generate(PROMPT, 40)
    assert trace.tokens == greedy(reference, PROMPT, 40)
    assert sum(trace.accept_lens) + trace.rounds + 1 >= 40 > sum(trace.accept_lens[:-1]) + trace.rounds
    assert len(trace.draft_gaps) == trace.rounds and min(trace.draft_gaps) >= 0


def test_perfect_drafts_fill_whole_blocks(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle drafter, so that acceptance and truncation inside a block are seen, not only rejections."""
    expected = greedy(reference, PROMPT, 30)

    def oracle(state: State, anchor: int, width: int | None) -> Tensor:
        done = state.length - len(PROMPT) + 1
        logits = torch.zeros(BLOCK, Shape().vocab)
        for row, token in enumerate(expected[done : done + BLOCK]):
            logits[row, token] = 1.0
        return logits

    monkeypatch.setattr(reference, "draft_logits", oracle)
    trace = reference.generate(PROMPT, 1 + 2 * BLOCK)
    assert trace.tokens == expected[: 1 + 2 * BLOCK]
    assert trace.accept_lens == [BLOCK - 1, BLOCK - 1]
    stop = expected[5]
    stopped = reference.generate(PROMPT, 30, stop_ids={stop})
    assert stopped.tokens == expected[: expected.index(stop) + 1]
    assert reference.generate(PROMPT, 30, context_len=len(PROMPT) + 4).tokens == expected[:4]


def test_generation_can_end_with_the_prefill_token(reference: Reference) -> None:
    first = greedy(reference, PROMPT, 1)
    for trace in (reference.generate(PROMPT, 1), reference.generate(PROMPT, 9, stop_ids=first)):
        assert trace.tokens == first and trace.rounds == 0


def test_top2_gap_is_the_margin_of_the_argmax() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [3.0, 3.0, -1.0]])
    assert top2_gap(logits).tolist() == [1.5, 0.0]
