"""Grammar-constrained requests give plain SGLang's constrained greedy output, whatever becomes of the drafts."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jsonschema
import pytest
import requests

from benchmarks.structured.cases import SCHEMAS
from benchmarks.structured.run import metrics
from examples.train_nano.corpus import held_out
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import Reply, both, generate, generate_together, prompt_of, tokens_per_cycle
from tests.e2e.serving import streaming

pytestmark = pytest.mark.e2e

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 3},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "tags", "count"],
    "additionalProperties": False,
}
NUM_TOKENS = 48
REGEX = r"(yes|no), because [a-z]{3,12} is (one|two|three)\."
EBNF = 'root ::= "SELECT " column (", " column)* " FROM " ("users" | "orders") ";"\ncolumn ::= "id" | "name" | "total"'
TAGS = json.dumps(
    {
        "type": "structural_tag",
        "structures": [{"begin": "<tool_call>", "schema": SCHEMA, "end": "</tool_call>"}],
        "triggers": ["<tool_call>"],
    }
)
MANY = {f"property_{index}": {"type": "integer", "minimum": 0, "maximum": 9} for index in range(200)}
NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["next"],
    "additionalProperties": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "json": ("arith", {"json_schema": json.dumps(SCHEMA)}),
    "regex": ("chat", {"regex": REGEX}),
    "ebnf": ("arith", {"ebnf": EBNF}),
    "structural tag": ("tools", {"structural_tag": TAGS}),
    "any JSON": ("json", {"json_schema": "$$ANY$$"}),
    "200 properties": (
        "json",
        {"json_schema": json.dumps({"type": "object", "properties": MANY, "required": [*MANY]})},
    ),
    "deep recursion": ("qa", {"json_schema": json.dumps({"$defs": {"node": NODE}, "$ref": "#/$defs/node"})}),
    **{
        case["name"]: ("json", {"json_schema": json.dumps(case["schema"])})
        for case in map(json.loads, SCHEMAS.read_text(encoding="utf-8").splitlines())
        if case["name"] in {"invoice", "any_of_payment", "unicode_enum", "escapes", "optional_fields", "matrix"}
    },
}


@pytest.fixture(scope="module")
def expected(plain: Server) -> dict[str, Reply]:
    """Plain SGLang's answers, one request at a time."""
    return {
        name: generate(plain, prompt_of(family), NUM_TOKENS, **grammar) for name, (family, grammar) in CASES.items()
    }


@pytest.mark.parametrize("index", range(4))
def test_schemas_that_the_prompt_asks_for(orthrus: Server, plain: Server, index: int) -> None:
    """The model would write this JSON by itself, so drafts survive the masks."""
    sample = held_out("json", 4)[index]
    schema = json.dumps(sample.schema)
    ours, theirs = both(generate, (orthrus, plain), prompt_of("json", index), json_schema=schema)
    assert ours["output_ids"] == theirs["output_ids"]
    jsonschema.validate(json.loads(ours["text"]), sample.schema)
    assert tokens_per_cycle(ours) > 5


def is_valid(grammar: dict[str, Any], text: str) -> bool:
    if "json_schema" in grammar:
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    pattern = REGEX if "regex" in grammar else r"SELECT (id|name|total)(, (id|name|total))* FROM (users|orders);"
    return re.fullmatch(pattern, text) is not None


@pytest.mark.parametrize("name", CASES)
def test_grammars_against_the_models_will(orthrus: Server, expected: dict[str, Reply], name: str) -> None:
    """Prompts that ask for something else: the masks overrule most drafts."""
    family, grammar = CASES[name]
    ours = generate(orthrus, prompt_of(family), NUM_TOKENS, **grammar)
    assert ours["output_ids"] == expected[name]["output_ids"]
    if name in ("json", "regex", "ebnf") and ours["meta_info"]["finish_reason"]["type"] == "stop":
        assert is_valid(grammar, ours["text"])


def test_constrained_and_free_requests_share_a_batch_of_8(
    orthrus: Server, plain: Server, expected: dict[str, Reply]
) -> None:
    names = ("json", "regex", "structural tag", "200 properties", "invoice")
    free = [(prompt_of(family), NUM_TOKENS) for family in ("json", "qa", "think")]
    alone = [generate(plain, *request)["output_ids"] for request in free]
    constrained = [(prompt_of(CASES[name][0]), CASES[name][1]) for name in names]
    wanted = [*constrained[:2], *((ids, {}) for ids, _ in free), *constrained[2:]]
    body = {
        "input_ids": [list(ids) for ids, _ in wanted],
        "sampling_params": [{"temperature": 0, "max_new_tokens": NUM_TOKENS, **grammar} for _, grammar in wanted],
    }
    together = [reply["output_ids"] for reply in orthrus.post("/generate", body)]
    outputs = [expected[name]["output_ids"] for name in names]
    assert together == [*outputs[:2], *alone, *outputs[2:]]


def test_an_answer_cut_short_in_an_object(orthrus: Server, plain: Server) -> None:
    grammar = {"json_schema": json.dumps(held_out("json", 1)[0].schema)}
    for count in (1, 5, 9):
        ours, theirs = both(generate, (orthrus, plain), prompt_of("json"), count, **grammar)
        assert ours["output_ids"] == theirs["output_ids"]
        assert ours["meta_info"]["finish_reason"] == {"type": "length", "length": count}


def test_a_stop_string_inside_constrained_text(orthrus: Server, plain: Server) -> None:
    grammar = {"json_schema": json.dumps(held_out("json", 1)[0].schema), "stop": ['":']}
    ours, theirs = both(generate, (orthrus, plain), prompt_of("json"), 100, **grammar)
    assert (ours["output_ids"], ours["text"]) == (theirs["output_ids"], theirs["text"])
    assert ours["meta_info"]["finish_reason"] == theirs["meta_info"]["finish_reason"]


@pytest.mark.parametrize(
    "grammar",
    [{"json_schema": "{"}, {"json_schema": '{"type": "nonsense"}'}, {"regex": "("}, {"ebnf": "root = nonsense"}],
    ids=["cut", "no such type", "regex", "ebnf"],
)
def test_a_grammar_that_does_not_compile_gets_a_400(orthrus: Server, plain: Server, grammar: dict[str, str]) -> None:
    messages = []
    for server in (orthrus, plain):
        sampling = {"temperature": 0, "max_new_tokens": 8, **grammar}
        body = {"input_ids": list(prompt_of("json")), "sampling_params": sampling}
        reply = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert reply.status_code == 400
        messages.append(re.sub(r"\d\d:\d\d:\d\d", "", reply.json()["error"]["message"]))
    assert messages[0] == messages[1]
    assert "Failed to compile" in messages[0]


def slow_schema(seed: int) -> str:
    """Half a second or so to compile, and in no cache."""
    items = {
        f"field_{seed}_{index}": {"type": "string", "pattern": f"^([a-z]{{2,{index + 3}}}[0-9]?)+$"}
        for index in range(60)
    }
    return json.dumps({"type": "object", "properties": items, "required": [*items]})


def test_a_grammar_compiles_while_others_decode(orthrus: Server, plain: Server) -> None:
    compiled: list[Reply] = []
    with streaming(orthrus, prompt_of("prose"), 200) as chunks:
        next(chunks)
        late = threading.Thread(
            target=lambda: compiled.append(generate(orthrus, prompt_of("json"), 24, json_schema=slow_schema(1)))
        )
        late.start()
        *_, last = chunks
        late.join()
    assert last["output_ids"] == generate(plain, prompt_of("prose"), 200)["output_ids"]
    assert compiled[0]["output_ids"] == generate(plain, prompt_of("json"), 24, json_schema=slow_schema(1))["output_ids"]


def test_a_request_is_cancelled_while_its_grammar_compiles(orthrus: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 2000, "json_schema": slow_schema(2)}
    body = {"input_ids": list(prompt_of("json")), "sampling_params": sampling, "rid": "to-be-cancelled"}
    replies: list[requests.Response] = []
    waiting = threading.Thread(
        target=lambda: replies.append(requests.post(f"{orthrus.url}/generate", json=body, timeout=120))
    )
    waiting.start()
    while not replies and waiting.is_alive():
        requests.post(f"{orthrus.url}/abort_request", json={"rid": "to-be-cancelled"}, timeout=60)
        waiting.join(0.05)
    assert replies[0].status_code == 400 or replies[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert generate(orthrus, prompt_of("chat"), 40, regex=REGEX)["text"].startswith(("yes", "no"))


def test_what_grammars_did_to_drafts_is_told(orthrus: Server) -> None:
    generate_together(orthrus, [(prompt_of("json"), 8)], 1)
    generate(orthrus, prompt_of("arith"), 60, json_schema=json.dumps(SCHEMA))
    told = orthrus.get("/metrics").text
    for change in ("none", "repaired", "forced"):
        assert f'sglang_orthrus:grammar_drafts_total{{change="{change}"' in told
    for time in ("walk", "choose"):
        assert f"sglang_orthrus:grammar_{time}_seconds_bucket" in told
    assert re.search(r"ORTHRUS grammar: \d+ drafts, [\d.]+ % repaired, [\d.]+ % forced", orthrus.log_tail(1000))


def test_no_round_is_verified_behind_an_answer(orthrus: Server) -> None:
    """The overlap scheduler begins one before it knows of the end."""

    def num_walks() -> float:
        return sum(number for name, number in metrics(orthrus).items() if "walk_seconds_count" in name)

    before = num_walks()
    reply = generate(orthrus, prompt_of("json"), 20, json_schema=json.dumps(SCHEMA))
    generate(orthrus, prompt_of("chat"), 1)  # comes behind what was begun
    assert reply["meta_info"]["finish_reason"]["type"] == "length", "so that its grammar could go on"
    assert num_walks() - before == reply["meta_info"]["spec_verify_ct"]
