"""A widened checkpoint computes nano's function: logits, greedy text and rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.common.reference import Reference
from benchmarks.common.widen import SHAPES, Width, widen
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.models.checkpoint import check_tensors, export_ar, tensor_names
from tests.e2e.helpers import prompt_of
from tests.fixtures import Shape, write_checkpoint

# Real hidden size, heads and key-value heads; few layers, neurons and words, to fit a laptop.
LAYERS, NEURONS, VOCAB = 7, 1024, 4224
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "1.7B" else pytest.mark.slow) for name in SHAPES]
)
def test_a_widened_nano_gives_nano_s_logits_text_and_rounds(tmp_path: Path, reference: Reference, name: str) -> None:
    width = replace(SHAPES[name], layers=LAYERS, intermediate=NEURONS, vocab=VOCAB)
    wide = Reference(widen(NANO, tmp_path / "wide", width))
    ids = prompt_of("json")
    known = reference.head.shape[0]

    for ours, nano in (
        (wide.ar_logits(ids), reference.ar_logits(ids)),
        (wide.diff_logits(ids[:-1], ids[-1]), reference.diff_logits(ids[:-1], ids[-1])),
    ):
        assert (ours[:, :known] - nano).abs().max() < TOLERANCE * nano.std()
        assert (ours[:, known:].max(-1).values < ours[:, :known].max(-1).values).all()

    trace, expected = wide.generate(ids, 24), reference.generate(ids, 24)
    assert trace.tokens == expected.tokens
    assert trace.accept_lens == expected.accept_lens


def test_query_heads_keep_their_key_value_heads_in_another_grouping(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "small", Shape(tied=False))
    small = Reference(source)
    width = Width(hidden=192, intermediate=128, layers=3, heads=12, kv_heads=3, vocab=400, tied=False)
    wide = Reference(widen(source, tmp_path / "wide", width))
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    assert (wide.ar_logits(ids)[:, :320] - small.ar_logits(ids)).abs().max() < 1e-3
    assert wide.generate(ids, 40).tokens == small.generate(ids, 40).tokens


def test_the_result_is_a_whole_checkpoint_whose_ar_export_links(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "small")
    width = Width(hidden=128, intermediate=128, layers=4, heads=4, kv_heads=2, vocab=400, tied=True)
    wide = widen(source, tmp_path / "wide", width)
    check_tensors(tensor_names(wide), width.layers)
    exported = export_ar(wide, tmp_path / "ar")
    assert not any("_diff." in name for name in tensor_names(exported))
    shared = [file for file in exported.glob("*.safetensors") if file.stat().st_nlink > 1]
    assert len(shared) == width.layers + 1


def test_a_shape_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        widen(NANO, tmp_path / "wide", replace(SHAPES["8B"], layers=2))


def test_every_id_has_a_text_and_text_is_encoded_as_before(tmp_path: Path) -> None:
    width = Width(hidden=256, intermediate=768, layers=6, heads=4, kv_heads=2, vocab=6000, tied=True)
    small, wide = (
        Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (NANO, widen(NANO, tmp_path / "wide", width))
    )
    assert wide.get_vocab_size() == width.vocab
    texts = [wide.id_to_token(number) for number in range(width.vocab)]
    assert all(texts) and len(set(texts)) == width.vocab
    for text in ('{"name": "Ada Lovelace", "born": 1815}', "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"):
        assert wide.encode(text).ids == small.encode(text).ids
