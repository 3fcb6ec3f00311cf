"""orthrus-nano's training code: data, masks, losses, decoding, and the two stages end to end in miniature."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import jsonschema
import pytest
import torch

from examples.train_nano import checkpoint, train
from examples.train_nano.chat_format import sample_prompt
from examples.train_nano.corpus import FAMILIES, held_out, train_sample
from examples.train_nano.decode import generate
from examples.train_nano.evaluate import evaluate
from examples.train_nano.export import export, load_exported
from examples.train_nano.losses import Inputs, draft_hidden, sample_anchors, teach, teacher_rows
from examples.train_nano.masks import dense, packed_blocks, packed_causal
from examples.train_nano.measures import copied, fixed_by_format, is_exact, ngram_rounds
from examples.train_nano.model import NanoConfig, OrthrusLM
from examples.train_nano.pack import ANSWER, PAD, train_rows
from examples.train_nano.pools import HELD_OUT, TRAIN, pools
from examples.train_nano.sample import compact
from examples.train_nano.tokenizer import MASK_ID, TAGS, TOKENIZER_DIR, load_tokenizer


def test_samples_depend_on_split_seed_and_index_alone() -> None:
    again = [train_sample(5, index) for index in range(50)]
    assert [train_sample(5, index) for index in range(50)] == again
    assert [train_sample(6, index) for index in range(50)] != again
    assert held_out("json", 20) == held_out("json", 40)[:20]


def test_held_out_names_and_prompts_are_not_in_training() -> None:
    for pool in ("firsts", "lasts", "cities", "items", "text_keys", "int_keys"):
        assert not set(getattr(pools(TRAIN), pool)) & set(getattr(pools(HELD_OUT), pool))
    seen = {sample_prompt(train_sample(1, index)) for index in range(20_000)}
    for family in set(FAMILIES) - {"chat", "arith", "think"}:
        assert not [s for s in held_out(family, 200) if sample_prompt(s) in seen], family


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_answers_fit_their_schema_their_limits_and_their_own_score(family: str) -> None:
    tokenizer = load_tokenizer()
    for sample in held_out(family, 300):
        encoding = tokenizer.encode(sample.answer)
        assert len(tokenizer.encode(sample_prompt(sample)).ids) <= 1500
        assert len(encoding.ids) < 400
        assert is_exact(sample, sample.answer) is (None if sample.check == "none" else True)
        assert len(fixed_by_format(sample, encoding.offsets)) == len(encoding.ids)
        if sample.check == "json":
            assert sample.schema is not None
            jsonschema.validate(sample.expected, sample.schema)
            assert list(sample.expected) == [key for key in sample.schema["properties"] if key in sample.expected]
            assert sample.answer.endswith(compact(sample.expected))
        if sample.check == "tools":
            assert sample.tools is not None
            functions = {tool["function"]["name"]: tool["function"] for tool in sample.tools}
            for call in sample.expected:
                jsonschema.validate(call["arguments"], functions[call["name"]]["parameters"])


def test_wrong_answers_are_scored_as_wrong() -> None:
    sample = next(s for s in held_out("json", 50) if "true" in s.answer)
    assert not is_exact(sample, sample.answer.replace("true", "1"))
    assert not is_exact(sample, sample.answer[:-1])
    call = next(s for s in held_out("tools", 50) if s.check == "tools")
    assert not is_exact(call, call.answer.replace('{"name": "', '{"name": "x_', 1))


def test_the_python_rendering_equals_the_jinja_template() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    assert tokenizer.mask_token_id == MASK_ID == len(tokenizer) - 1
    for family in FAMILIES:
        for sample in held_out(family, 40):
            flags = {"enable_thinking": True} if sample.thinking else {}
            rendered = tokenizer.apply_chat_template(
                sample.messages, tools=sample.tools, tokenize=False, add_generation_prompt=True, **flags
            )
            assert rendered == sample_prompt(sample)


def test_tags_are_single_tokens_that_survive_decoding() -> None:
    tokenizer = load_tokenizer()
    text = '<think>\nyes\n</think>\n\n<tool_call>\n{"name": "f"}\n</tool_call><|im_end|>'
    ids = tokenizer.encode(text).ids
    assert {tokenizer.token_to_id(tag) for tag in TAGS} <= set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")


def _inputs(length: int = 512, rows: int = 2) -> Inputs:
    packed = train_rows(1, 0, load_tokenizer(), length)
    few = packed.part(0, rows)
    return Inputs(*(torch.from_numpy(array.astype("int64")) for array in (few.ids, few.docs, few.positions, few.kinds)))


def test_packed_rows_hold_whole_conversations_that_end_with_the_end_of_turn() -> None:
    rows = train_rows(1, 3, load_tokenizer(), 1024)
    end = load_tokenizer().token_to_id("<|im_end|>")
    assert (rows.kinds != PAD).mean() > 0.9
    for row in range(rows.count):
        for doc in range(1, rows.docs[row].max() + 1):
            mine = rows.docs[row] == doc
            assert (rows.positions[row][mine] == range(mine.sum())).all()
            assert rows.kinds[row][mine][-1] == ANSWER and rows.ids[row][mine][-1] == end
            assert end not in rows.ids[row][mine & (rows.kinds[row] == ANSWER)][:-1]


def test_masks_equal_their_definition() -> None:
    docs = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    anchors = torch.tensor([[1, 4], [3, 6]])
    length, block = 8, 4
    causal = dense(packed_causal(docs), 2, length, length, docs.device)
    blocks = dense(packed_blocks(docs, anchors, block), 2, 2 * block, length + 2 * block, docs.device)
    for b in range(2):
        for q in range(length):
            for kv in range(length):
                assert causal[b, 0, q, kv] == (kv <= q and docs[b, q] == docs[b, kv])
        for q in range(2 * block):
            anchor = int(anchors[b, q // block])
            for kv in range(length):
                assert blocks[b, 0, q, kv] == (kv < anchor and docs[b, kv] == docs[b, anchor])
            for kv in range(2 * block):
                assert blocks[b, 0, q, length + kv] == (kv // block == q // block)


def test_anchors_are_answer_tokens_and_rows_end_with_the_answer() -> None:
    inputs = _inputs()
    block = 32
    anchors = sample_anchors(inputs, 40, block, torch.Generator().manual_seed(0))
    seen = 0
    for b in range(2):
        chosen = [int(a) for a, rows in zip(anchors.at[b], anchors.rows[b], strict=True) if rows.any()]
        assert chosen == sorted(set(chosen))
        for at, rows in zip(anchors.at[b].tolist(), anchors.rows[b], strict=True):
            if not rows.any():
                continue
            seen += 1
            assert inputs.kinds[b, at] == ANSWER
            for i in range(block - 1):
                label = at + i + 1
                inside = label < inputs.ids.shape[1]
                same = inside and inputs.docs[b, label] == inputs.docs[b, at] and inputs.kinds[b, label] == ANSWER
                assert bool(rows[i]) == bool(same)
    assert seen > 20


def _tiny() -> OrthrusLM:
    torch.manual_seed(0)
    model = OrthrusLM(NanoConfig().tiny()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_diff" in name:
                p.add_(0.3 * p.std().nan_to_num() * torch.randn_like(p))
    return model


@torch.no_grad()
def test_block_row_i_is_taught_by_ar_row_a_plus_i_and_computed_as_if_alone() -> None:
    model, inputs = _tiny(), _inputs()
    block, length = model.config.block_size, inputs.ids.shape[1]
    anchors = sample_anchors(inputs, 8, block, torch.Generator().manual_seed(1))
    teacher = teach(model, inputs, dense(packed_causal(inputs.docs), 2, length, length, inputs.ids.device))
    mask = dense(packed_blocks(inputs.docs, anchors.at, block), 2, 8 * block, length + 8 * block, inputs.ids.device)
    drafts = draft_hidden(model, inputs, teacher, anchors.at, mask).view(2, 8, block - 1, -1)
    targets = teacher_rows(teacher, anchors.at, block).view(2, 8, block - 1, -1)
    checked = 0
    for b in range(2):
        for n, at in enumerate(anchors.at[b].tolist()):
            if not anchors.rows[b, n].any():
                continue
            # The conversation alone, up to the anchor, then one block: no packing, no other blocks.
            first = at - int(inputs.positions[b, at])
            past = inputs.ids[b : b + 1, first:at]
            keys: list[tuple[torch.Tensor, torch.Tensor]] = []

            def record(layer: int, k: torch.Tensor, v: torch.Tensor, keys: list = keys) -> tuple:  # type: ignore[type-arg]
                keys.append((k, v))
                return k, v

            model.hidden(past, torch.arange(past.shape[1])[None], "ar", record, None)

            def joined(layer: int, k: torch.Tensor, v: torch.Tensor, keys: list = keys) -> tuple:  # type: ignore[type-arg]
                return torch.cat((keys[layer][0], k), 2), torch.cat((keys[layer][1], v), 2)

            ids = torch.tensor([[int(inputs.ids[b, at])] + [MASK_ID] * (block - 1)])
            everything = torch.ones(1, 1, block, past.shape[1] + block, dtype=torch.bool)
            alone = model.hidden(ids, past.shape[1] + torch.arange(block)[None], "diff", joined, everything)
            torch.testing.assert_close(drafts[b, n], alone[0, :-1], rtol=1e-4, atol=1e-4)
            for i in range(block - 1):
                if anchors.rows[b, n, i]:
                    torch.testing.assert_close(targets[b, n, i], teacher.hidden[b, at + i])
            checked += 1
    assert checked > 8


def test_drafting_does_not_change_the_answer() -> None:
    model = _tiny()
    tokenizer = load_tokenizer()
    prompts = [tokenizer.encode(sample_prompt(s)).ids[:200] for s in held_out("json", 3)]
    plain = generate(model, prompts, 60, frozenset(), speculate=False)
    drafted = generate(model, prompts, 60, frozenset())
    assert [g.ids for g in plain] == [g.ids for g in drafted]
    for g in drafted:
        assert sum(g.rounds) == 59 and max(g.rounds) <= 32


def test_prompt_lookup_and_copy_counts_on_small_cases() -> None:
    assert ngram_rounds([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]) == 1
    assert ngram_rounds([7, 8, 9], [1, 2, 3]) == 2
    assert copied([1, 2, 3, 4], [9, 2, 3, 4, 1, 2]) == [False, True, True, True, False, False]


def _smoke(stage: str, out: Path, *more: str) -> checkpoint.Progress:
    return train.run(train.parse([stage, "--smoke", "--rows", "2", "--device", "cpu", "--out", str(out), *more]))


def test_both_stages_learn_export_and_evaluate_in_miniature(tmp_path: Path) -> None:
    first = _smoke("ar", tmp_path / "ar", "--steps", "25", "--verify")
    assert first.history[-1]["loss"] < 8.2
    second = _smoke("diff", tmp_path / "diff", "--steps", "6", "--init", str(tmp_path / "ar"), "--verify")
    assert second.step == 6
    model, _ = checkpoint.load_model(tmp_path / "diff")
    start, _ = checkpoint.load_model(tmp_path / "ar")
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        is_trained = "_diff" in name
        assert torch.equal(p, q.bfloat16().float()) != is_trained, name
    export(model, tmp_path / "nano")
    config = json.loads((tmp_path / "nano" / "config.json").read_text())
    assert config["architectures"] == ["OrthrusLM"] and config["mask_token_id"] == MASK_ID
    exported = load_exported(tmp_path / "nano")
    assert asdict(exported.config) == asdict(model.config)
    report = evaluate(exported, tmp_path / "nano", 1, 1, max_new=40)
    assert set(report["families"]) == set(FAMILIES)


@pytest.mark.parametrize("stage", ["ar", "diff"])
def test_a_resumed_run_continues_exactly(stage: str, tmp_path: Path) -> None:
    more = ["--steps", "6"]
    if stage == "diff":
        _smoke("ar", tmp_path / "ar", "--steps", "1")
        more += ["--init", str(tmp_path / "ar")]
    _smoke(stage, tmp_path / "whole", *more)
    _smoke(stage, tmp_path / "parts", *more, "--stop-after", "3")
    _smoke(stage, tmp_path / "parts", *more, "--resume")
    whole, _ = checkpoint.load_model(tmp_path / "whole")
    parts, _ = checkpoint.load_model(tmp_path / "parts")
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q), name
