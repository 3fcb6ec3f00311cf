"""Grammars where more is forced and more is at stake: no white space, behind a reasoning, under llguidance.

The truth is the reference model under the same grammar object, token by token; plain SGLang's own answers to many more
prompts are compared by `benchmarks.structured`. With llguidance and a reasoning parser plain SGLang answers 400 to
every request with a grammar, so there patches/0008 is applied to it; ORTHRUS runs as shipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, BaseGrammarObject
from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from benchmarks.common.reference import Reference
from benchmarks.structured.cases import END, Case, foreign_cases, own_cases, tool_cases
from benchmarks.structured.run import metrics
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar
from tests.e2e.helpers import Reply, tokens_per_cycle
from tests.e2e.serving import streaming
from tests.patching import patched_sglang
from tests.servers import LLGUIDANCE, NO_WHITE_SPACE, REASONING, SETUP, TEST_ARGS

pytestmark = pytest.mark.e2e

MAX_NEW_TOKENS = 96
VOCABULARY = 4096
TOKENIZER = get_tokenizer(str(NANO))
END_ID = TOKENIZER.convert_tokens_to_ids(END)
THINK_END = TOKENIZER.convert_tokens_to_ids("</think>")


@pytest.fixture(scope="module")
def llguidance() -> Iterator[Server]:
    """The other engine, white space anywhere; overlap scheduling, which `narrow` lacks."""
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *LLGUIDANCE, env=SETUP.env) as server:
        yield server


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment where SGLang lets llguidance begin behind a reasoning."""
    return patched_sglang("0008-llguidance-behind-a-reasoning", tmp_path_factory.mktemp("patched"))


@pytest.fixture(scope="module")
def reasoning_llguidance() -> Iterator[Server]:
    """The other engine, with a reasoning parser."""
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *REASONING, *LLGUIDANCE, env=SETUP.env) as server:
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


def num_sparse_blocks(server: Server) -> float:
    """Blocks of which only the masks were filled that were needed."""
    return sum(number for name, number in metrics(server).items() if "blocks_total" in name and "needed" in name)


def test_schemas_without_white_space(small: Server, reference: Reference) -> None:
    """Of kinds that nano was not trained on. With the drafts left alone they come to 1.3 tokens per cycle."""
    replies = assert_as_the_reference(small, reference, xgrammar_backend(), foreign_cases()[::10])
    assert mean_tokens_per_cycle(replies) > 2


def test_own_prompts_without_white_space(small: Server, reference: Reference) -> None:
    cases = [*own_cases(4), *tool_cases(4)]
    replies = assert_as_the_reference(small, reference, xgrammar_backend(), cases)
    assert mean_tokens_per_cycle(replies) > 10
    before = num_sparse_blocks(small)
    assert [reply["output_ids"] for reply in ask_all(small, cases)] == [reply["output_ids"] for reply in replies]
    rounds = sum(reply["meta_info"]["spec_verify_ct"] for reply in replies)
    assert num_sparse_blocks(small) - before >= rounds / 2, "their grammars are slow now"


@pytest.mark.slow
def test_every_schema_without_white_space(small: Server, reference: Reference) -> None:
    assert_as_the_reference(small, reference, xgrammar_backend(), foreign_cases())


def test_schemas_under_llguidance(narrow: Server, reference: Reference) -> None:
    cases = [*foreign_cases()[3::22], *own_cases(3)]
    assert_as_the_reference(narrow, reference, llguidance_backend(), cases)


@pytest.mark.slow
def test_every_schema_under_llguidance(llguidance: Server, reference: Reference) -> None:
    assert_as_the_reference(llguidance, reference, llguidance_backend(), foreign_cases())


# A server with a reasoning parser, the grammar objects that it makes, and the flag that makes it use this engine.
ENGINES = [
    pytest.param("small", xgrammar_backend, (NO_WHITE_SPACE,), id="xgrammar"),
    pytest.param("reasoning_llguidance", llguidance_backend, LLGUIDANCE, id="llguidance", marks=pytest.mark.slow),
]


def thinking_about(case: Case) -> Case:
    """The same with the thoughts left to the model."""
    prompt = case.prompt.removesuffix("<think>\n\n</think>\n\n")
    assert prompt != case.prompt
    return replace(case, prompt=prompt + "<think>\n")


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(("name", "backend", "_flag"), ENGINES)
def test_a_grammar_begins_behind_the_reasoning(
    request: pytest.FixtureRequest,
    reference: Reference,
    name: str,
    backend: Callable[[], BaseGrammarBackend],
    _flag: tuple[str, ...],
    thinking: bool,
) -> None:
    """The end of the reasoning lies inside an accepted run; the thoughts themselves are free."""
    case = own_cases(1)[0]
    grammar = grammar_of(backend(), case)
    if thinking:
        case = thinking_about(case)
        grammar = ReasonerGrammarObject(grammar, [THINK_END])
        grammar.maybe_init_reasoning(True)
    server: Server = request.getfixturevalue(name)
    ids = TOKENIZER.encode(case.prompt, add_special_tokens=False)
    with streaming(server, ids, MAX_NEW_TOKENS, require_reasoning=thinking, **case.grammar) as chunks:
        rounds = list(chunks)
    reply = rounds[-1]
    assert reply["output_ids"] == greedy(reference, case.prompt, grammar)
    answer = reply["text"].rpartition("</think>")[2]
    jsonschema.validate(json.loads(answer), case.schema)
    assert tokens_per_cycle(reply) > 5
    if thinking and name != "small":  # that one has no time for masks, so a grammar that waits ends its round
        run = next(chunk["output_ids"] for chunk in rounds if THINK_END in chunk["output_ids"])
        assert run[-1] != THINK_END, "the grammar should begin in the round that ends the reasoning"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "_backend", "flag"), ENGINES)
def test_answers_behind_a_reasoning_are_plain_sglangs(
    request: pytest.FixtureRequest,
    patched: dict[str, str],
    tmp_path: Path,
    name: str,
    _backend: Callable[[], BaseGrammarBackend],
    flag: tuple[str, ...],
) -> None:
    """With thoughts and without, eight in flight. llguidance fails on some tool calls, which ends these alone."""
    cases = [*own_cases(8), *foreign_cases()[::11], *tool_cases(4)]

    def outcome(server: Server, case: Case, thinking: bool) -> list[int]:
        try:
            return ask(server, thinking_about(case) if thinking else case, require_reasoning=thinking)["output_ids"]
        except requests.HTTPError as error:
            assert error.response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR
            return []

    def outcomes(server: Server) -> dict[str, list[int]]:
        asked = {f"{case.name}, {thinking}": (case, thinking) for case in cases for thinking in (True, False)}
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(asked, pool.map(lambda one: outcome(server, *one), asked.values()), strict=True))

    ours = outcomes(request.getfixturevalue(name))
    env = {**SETUP.env, **plain_env(), **patched}
    with Server(export_ar(NANO, tmp_path / "nano-ar"), *TEST_ARGS, *REASONING, *flag, env=env) as plain:
        assert ours == outcomes(plain)
    assert sum(THINK_END in output[:-1] for output in ours.values()) > len(cases) / 2
    assert all(output for name, output in ours.items() if not name.startswith("tools"))
