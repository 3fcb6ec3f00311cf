"""What the benchmarks of structured generation ask: nano's own JSON prompts, and the schemas of `tests/data`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import jsonschema
import torch
from tokenizers import Tokenizer
from xgrammar import (
    GrammarCompiler,
    GrammarMatcher,
    TokenizerInfo,
    allocate_token_bitmask,
    apply_token_bitmask_inplace,
)

from benchmarks.common.provenance import ROOT
from benchmarks.common.reference import Reference
from examples.train_nano.chat_format import render_prompt, sample_prompt
from examples.train_nano.corpus import held_out
from sglang_orthrus.cli.demo import NANO

SCHEMAS = ROOT / "tests" / "data" / "schemas.jsonl"
END = "<|im_end|>"


@dataclass(frozen=True)
class Case:
    """A prompt and what its answer has to follow.

    Attributes:
        grammar: as sampling parameters: {"json_schema": ...}, {"regex": ...} or {"ebnf": ...}.
        schema: the same, decoded, if it is a JSON schema.
    """

    name: str
    prompt: str
    grammar: dict[str, str]
    schema: Any = None


@dataclass(frozen=True)
class Block:
    """A draft block of nano's: what the diffusion view proposes at some point of a constrained answer.

    Attributes:
        committed: the answer so far, anchor included.
        candidates: [31, 64] int64, best first.
        answer: all of the constrained answer.
        best: the token that the model would choose behind `committed` without a grammar.
    """

    case: Case
    committed: list[int]
    candidates: torch.Tensor
    answer: list[int] = field(repr=False)
    best: int | None = None


def case_of(name: str, text: str, schema: Any) -> Case:
    """A request for JSON in the words that nano knows."""
    wanted = f"{text}\n\nReturn the data as JSON for this schema:\n{json.dumps(schema, ensure_ascii=False)}"
    return Case(name, render_prompt([{"role": "user", "content": wanted}]), {"json_schema": json.dumps(schema)}, schema)


def foreign_cases() -> list[Case]:
    """The schemas of `tests/data`, none of them of a kind that nano was trained on."""
    lines = map(json.loads, SCHEMAS.read_text(encoding="utf-8").splitlines())
    return [case_of(line["name"], line["text"], line["schema"]) for line in lines]


def own_cases(count: int) -> list[Case]:
    """Held-out prompts of nano's JSON family."""
    return [
        Case(f"json/{index}", sample_prompt(sample), {"json_schema": json.dumps(sample.schema)}, sample.schema)
        for index, sample in enumerate(held_out("json", count))
    ]


def tool_cases(count: int) -> list[Case]:
    """Held-out tool calls of nano's, constrained by structural tags, as SGLang does for strict tools."""
    samples = (sample for sample in held_out("tools", 3 * count) if sample.check == "tools" and sample.tools)
    cases = []
    for index, sample in enumerate(islice(samples, count)):
        functions = [tool["function"] for tool in sample.tools or ()]
        tags = [
            {
                "begin": f'<tool_call>\n{{"name": "{function["name"]}", "arguments": ',
                "schema": function["parameters"] | {"additionalProperties": False},
                "end": "}\n</tool_call>",
            }
            for function in functions
        ]
        tag = {"type": "structural_tag", "structures": tags, "triggers": ["<tool_call>"]}
        cases.append(Case(f"tools/{index}", sample_prompt(sample), {"structural_tag": json.dumps(tag)}))
    return cases


def is_valid(case: Case, text: str) -> bool:
    """Whether an answer is what its grammar asks for: JSON that follows the schema, or complete tool calls."""
    if case.schema is None:
        calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)
        return len(calls) == text.count("<tool_call>") > 0 and all(map(_is_json, calls))
    try:
        jsonschema.validate(json.loads(text), case.schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@cache
def nano() -> tuple[Tokenizer, Reference]:
    """Nano's tokenizer, and nano in plain PyTorch."""
    return Tokenizer.from_file(str(NANO / "tokenizer.json")), Reference(NANO)


def blocks(cases: Sequence[Case], *, any_whitespace: bool = False, max_new_tokens: int = 120) -> Iterator[Block]:
    """Every draft block that decoding these cases under XGrammar could meet, one per token of the answers."""
    tokenizer, model = nano()
    info = TokenizerInfo.from_huggingface(fast(tokenizer), stop_token_ids=[tokenizer.token_to_id(END)])
    compiler = GrammarCompiler(info)
    for case in cases:
        grammar = compiler.compile_json_schema(case.grammar["json_schema"], any_whitespace=any_whitespace)
        matcher, mask = GrammarMatcher(grammar), allocate_token_bitmask(1, info.vocab_size)
        state, answer, drafted, best = model.new_state(), list[int](), [], list[int]()
        logits = model.extend(state, tokenizer.encode(case.prompt, add_special_tokens=False).ids)
        while not matcher.is_terminated() and len(answer) < max_new_tokens:
            matcher.fill_next_token_bitmask(mask)
            best.append(int(logits[-1].argmax()))
            last = logits[-1:].clone()
            apply_token_bitmask_inplace(last, mask)
            answer.append(int(last.argmax()))
            matcher.accept_token(answer[-1])
            drafted.append(model.draft_logits(state, answer[-1])[:-1].topk(64).indices)
            logits = model.extend(state, answer[-1:])
        for length, candidates in enumerate(drafted[:-1], start=1):
            yield Block(case, answer[:length], candidates, answer, best[length])


def fast(tokenizer: Tokenizer) -> Any:
    """As a Transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
