"""Patches for SGLang's grammars on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.constrained import xgrammar_backend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cpu import replacements as patches
from tests.patching import PATCHES, apply, load

pytestmark = pytest.mark.contract


def excluded(module: Any) -> list[int]:
    """The tokens that a strict reasoning forbids on a CPU."""
    tokenizer = get_tokenizer(str(NANO))
    backend = module.XGrammarGrammarBackend(tokenizer, vocab_size=4096, model_eos_token_ids=[0])
    reasoner = ReasonerGrammarBackend(backend, ReasoningParser("qwen3"), tokenizer, enable_strict_thinking=True)
    reasoner.think_excluded_token_ids, reasoner.enable_token_filter = [3, 40], True
    reasoner._token_filter_fn = backend.set_token_filter
    grammar = reasoner.init_strict_reasoning_grammar(True)
    masks = grammar.allocate_vocab_mask(4096, 1, "cpu")
    masks.fill_(-1)
    grammar.fill_vocab_mask(masks, 0)
    logits = torch.zeros(1, 4096)
    grammar.apply_vocab_mask(logits, grammar.move_vocab_mask(masks, "cpu"))
    return (logits[0] == float("-inf")).nonzero().view(-1).tolist()


def test_strict_thinking_works_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = xgrammar_backend.XGrammarGrammarBackend
    as_shipped = load("shipped_xgrammar", Path(str(xgrammar_backend.__file__))).XGrammarGrammarBackend
    monkeypatch.setattr(stock, "apply_vocab_mask", staticmethod(as_shipped.apply_vocab_mask))
    with pytest.raises(RuntimeError, match="Unsupported device: cpu"):
        excluded(xgrammar_backend)
    patch = PATCHES / "0017-strict-thinking-on-a-cpu.patch"
    assert excluded(load("patched_xgrammar", apply(patch, tmp_path)[0])) == [3, 40]
    patches._mask_on_cpu()
    assert excluded(xgrammar_backend) == [3, 40]
