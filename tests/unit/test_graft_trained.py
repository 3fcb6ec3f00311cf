"""Nano's AR half, trained further on one family and grafted: its output is its own, its drafts are worth less."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from benchmarks.common.greedy import Prompt, load_prompts, stop_ids
from benchmarks.common.reference import Reference
from examples.train_nano.chat_format import END_OF_TURN, sample_prompt
from examples.train_nano.corpus import held_out_sample
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.models.checkpoint import export_ar
from sglang_orthrus.models.graft import graft

pytestmark = pytest.mark.slow
FAMILY, OTHER = "prose", "json"
STEPS, BATCH, RATE = 16, 4, 1e-4
# Beyond those that tests ask for.
FIRST_SAMPLE = 50_000
PROMPTS, TOKENS = 6, 96


def train_further(folder: Path, target: Path) -> Path:
    """Some steps of AdamW on texts of one family, spelt in capitals so that there is something to learn."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        loss = torch.zeros(())
        for number in range(BATCH):
            sample = held_out_sample(FAMILY, FIRST_SAMPLE + step * BATCH + number)
            prompt = tokenizer.encode(sample_prompt(sample), add_special_tokens=False).ids
            answer = tokenizer.encode(f"{sample.answer.upper()}{END_OF_TURN}", add_special_tokens=False).ids
            ids = torch.tensor([[*prompt, *answer]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            loss = loss + model(input_ids=ids, labels=labels).loss / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shutil.copytree(folder, target)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied
    (target / "model.safetensors").unlink()
    save_file(weights, target / "model.safetensors")
    return target


def tokens_per_cycle(model: Reference, prompts: list[Prompt], stops: set[int]) -> float:
    """Of greedy answers, each of which is checked against plain decoding."""
    tokens = rounds = 0
    for prompt in prompts:
        trace = model.generate(prompt.ids, TOKENS, stops)
        text = list(prompt.ids)
        state = model.new_state()
        logits = model.extend(state, text)
        for token in trace.tokens:
            assert int(logits[-1].argmax()) == token
            logits = model.extend(state, [token])
        tokens, rounds = tokens + len(trace.tokens) - 1, rounds + trace.rounds
    return tokens / rounds


def test_a_trained_fine_tune_keeps_its_output(tmp_path: Path) -> None:
    tuned = train_further(export_ar(NANO, tmp_path / "ar"), tmp_path / "tuned")
    grafted, former = Reference(graft(tuned, NANO, tmp_path / "grafted")), Reference(NANO)
    prompts, stops = load_prompts(NANO, 9 * PROMPTS), stop_ids(NANO)
    before, after = {}, {}
    for family in (FAMILY, OTHER):
        own = list(islice((prompt for prompt in prompts if prompt.family == family), PROMPTS))
        before[family], after[family] = (tokens_per_cycle(model, own, stops) for model in (former, grafted))
    print({family: (round(before[family], 2), round(after[family], 2)) for family in before})
    texts = [model.generate(prompts[-1].ids, TOKENS, stops).tokens for model in (former, grafted)]
    assert texts[0] != texts[1] or before != after, "nothing was learnt"
    assert after[FAMILY] > 1.0
    assert after[OTHER] > 2.0, "what was not trained is still drafted well"
