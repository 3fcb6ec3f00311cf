"""Grammars where more is forced and more is at stake: no white space, behind a reasoning, under llguidance.

The truth is the reference model under the same grammar object, token by token; plain SGLang's own answers to many more
prompts are compared by `benchmarks/structured.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, BaseGrammarObject
from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from benchmarks.structured_cases import END, Case, foreign_cases, own_cases, tool_cases
from sglang_orthrus.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.server import Server
from tests.conftest import SETUP, TEST_ARGS, slow
from tests.e2e.helpers import Reply, tokens_per_cycle
from tests.reference import Reference

pytestmark = pytest.mark.e2e

MAX_NEW_TOKENS = 96
VOCABULARY = 4096
STRICT = "--constrained-json-disable-any-whitespace"
TOKENIZER = get_tokenizer(str(NANO))
END_ID = TOKENIZER.convert_tokens_to_ids(END)
REASONING = ("--reasoning-parser", "qwen3")


@pytest.fixture(scope="module")
def strict() -> Iterator[Server]:
    """XGrammar without white space, and with a reasoning parser."""
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *REASONING, STRICT, env=SETUP.env) as server:
        yield server


@pytest.fixture(scope="module")
def llguidance() -> Iterator[Server]:
    """The other engine, white space anywhere; synchronous scheduling."""
    args = ("--grammar-backend", "llguidance", "--disable-overlap-schedule")
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *args, env=SETUP.env) as server:
        yield server


def xgrammar_backend() -> BaseGrammarBackend:
    return XGrammarGrammarBackend(TOKENIZER, VOCABULARY, model_eos_token_ids=[END_ID], any_whitespace=False)


def llguidance_backend() -> BaseGrammarBackend:
    return GuidanceBackend(TOKENIZER, any_whitespace=True, n_vocab=VOCABULARY, eos_token_ids=[END_ID])


def greedy(reference: Reference, prompt: str, grammar: BaseGrammarObject) -> list[int]:
    """The AR view's best tokens of those that the grammar allows."""
    mask, state = grammar.allocate_vocab_mask(VOCABULARY, 1, "cpu"), reference.new_state()
    output: list[int] = []
    pending = TOKENIZER.encode(prompt, add_special_tokens=False)
    while len(output) < MAX_NEW_TOKENS and END_ID not in output:
        logits = reference.extend(state, pending)[-1:].clone()
        mask.fill_(-1)
        grammar.fill_vocab_mask(mask, 0)
        words = mask[0][torch.arange(VOCABULARY) >> 5] >> (torch.arange(VOCABULARY) & 31) & 1
        token = int(logits[0].masked_fill(words == 0, float("-inf")).argmax())
        output.append(token)
        grammar.accept_token(token)
        pending = [token]
    return output


def ask(server: Server, case: Case, **options: Any) -> Reply:
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, **case.grammar}
    ids = TOKENIZER.encode(case.prompt, add_special_tokens=False)
    return server.post("/generate", {"input_ids": ids, "sampling_params": sampling, **options})


def ask_all(server: Server, cases: list[Case]) -> list[Reply]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda case: ask(server, case), cases))


def grammar_of(backend: BaseGrammarBackend, case: Case) -> BaseGrammarObject:
    if "structural_tag" in case.grammar:
        return backend.dispatch_structural_tag(case.grammar["structural_tag"])
    return backend.dispatch_json(case.grammar["json_schema"])


def assert_as_the_reference(
    server: Server, reference: Reference, backend: BaseGrammarBackend, cases: list[Case]
) -> list[Reply]:
    replies = ask_all(server, cases)
    for case, reply in zip(cases, replies, strict=True):
        assert reply["output_ids"] == greedy(reference, case.prompt, grammar_of(backend, case)), case.name
        if case.schema is not None and reply["meta_info"]["finish_reason"]["type"] == "stop":
            jsonschema.validate(json.loads(reply["text"]), case.schema)
    return replies


def mean_tokens_per_cycle(replies: list[Reply]) -> float:
    rounds = sum(reply["meta_info"]["spec_verify_ct"] for reply in replies)
    return sum(len(reply["output_ids"]) - 1 for reply in replies) / rounds


def test_schemas_without_white_space(strict: Server, reference: Reference) -> None:
    """Of kinds that nano was not trained on. With the drafts left alone they come to 1.3 tokens per cycle."""
    replies = assert_as_the_reference(strict, reference, xgrammar_backend(), foreign_cases()[::10])
    assert mean_tokens_per_cycle(replies) > 2


def test_own_prompts_without_white_space(strict: Server, reference: Reference) -> None:
    replies = assert_as_the_reference(strict, reference, xgrammar_backend(), [*own_cases(4), *tool_cases(4)])
    assert mean_tokens_per_cycle(replies) > 10


@slow
def test_every_schema_without_white_space(strict: Server, reference: Reference) -> None:
    assert_as_the_reference(strict, reference, xgrammar_backend(), foreign_cases())


def test_schemas_under_llguidance(llguidance: Server, reference: Reference) -> None:
    cases = [*foreign_cases()[3::22], *own_cases(3)]
    assert_as_the_reference(llguidance, reference, llguidance_backend(), cases)


@slow
def test_every_schema_under_llguidance(llguidance: Server, reference: Reference) -> None:
    assert_as_the_reference(llguidance, reference, llguidance_backend(), foreign_cases())


@pytest.mark.parametrize("thinking", [True, False])
def test_a_grammar_begins_behind_the_reasoning(strict: Server, reference: Reference, thinking: bool) -> None:
    """The end of the reasoning lies inside an accepted run; the thoughts themselves are free."""
    case = own_cases(1)[0]
    prompt = case.prompt.removesuffix("<think>\n\n</think>\n\n")
    assert prompt != case.prompt
    if thinking:
        prompt += "<think>\n"
    else:
        prompt = case.prompt
    case = Case(case.name, prompt, case.grammar, case.schema)
    reply = ask(strict, case, require_reasoning=thinking)
    grammar = grammar_of(xgrammar_backend(), case)
    if thinking:
        think_end = TOKENIZER.convert_tokens_to_ids("</think>")
        grammar = ReasonerGrammarObject(grammar, [think_end])
        grammar.maybe_init_reasoning(True)
    assert reply["output_ids"] == greedy(reference, prompt, grammar)
    answer = reply["text"].rpartition("</think>")[2]
    jsonschema.validate(json.loads(answer), case.schema)
    assert tokens_per_cycle(reply) > 5
