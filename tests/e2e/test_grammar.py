"""Grammar-constrained requests: masks at verification give plain SGLang's constrained greedy output."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from benchmarks.parity import held_out
from sglang_orthrus.server import Server
from tests.e2e.helpers import generate, prompt_of, tokens_per_cycle

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
REGEX = r"(yes|no), because [a-z]{3,12} is (one|two|three)\."
EBNF = 'root ::= "SELECT " column (", " column)* " FROM " ("users" | "orders") ";"\ncolumn ::= "id" | "name" | "total"'


@pytest.mark.parametrize("index", range(4))
def test_schemas_that_the_prompt_asks_for(orthrus: Server, plain: Server, index: int) -> None:
    """The model would write this JSON by itself, so drafts survive the masks."""
    sample = held_out("json", 4)[index]
    grammar = {"json_schema": json.dumps(sample.schema)}
    ours, theirs = (generate(server, prompt_of("json", index), **grammar) for server in (orthrus, plain))
    assert ours["output_ids"] == theirs["output_ids"]
    jsonschema.validate(json.loads(ours["text"]), sample.schema)
    assert tokens_per_cycle(ours) > 2


def is_valid(grammar: dict[str, Any], text: str) -> bool:
    if "json_schema" in grammar:
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    pattern = REGEX if "regex" in grammar else r"SELECT (id|name|total)(, (id|name|total))* FROM (users|orders);"
    return re.fullmatch(pattern, text) is not None


@pytest.mark.parametrize(
    "grammar", [{"json_schema": json.dumps(SCHEMA)}, {"regex": REGEX}, {"ebnf": EBNF}], ids=["json", "regex", "ebnf"]
)
def test_grammars_against_the_models_will(orthrus: Server, plain: Server, grammar: dict[str, Any]) -> None:
    """Prompts that ask for something else: the masks overrule most drafts."""
    for family in ("arith", "chat"):
        ours, theirs = (generate(server, prompt_of(family), 120, **grammar) for server in (orthrus, plain))
        assert ours["output_ids"] == theirs["output_ids"]
        if ours["meta_info"]["finish_reason"]["type"] == "stop":
            assert is_valid(grammar, ours["text"])


def test_constrained_and_free_requests_share_a_batch(orthrus: Server) -> None:
    requests = [(prompt_of(family), 100) for family in ("json", "arith", "qa")]
    alone = [generate(orthrus, *request)["output_ids"] for request in requests]
    constrained = generate(orthrus, prompt_of("chat"), 100, regex=REGEX)["output_ids"]
    body = {
        "input_ids": [list(prompt_of("chat")), *(list(ids) for ids, _ in requests)],
        "sampling_params": [
            {"temperature": 0, "max_new_tokens": 100, "regex": REGEX},
            *({"temperature": 0, "max_new_tokens": 100} for _ in requests),
        ],
    }
    together = [reply["output_ids"] for reply in orthrus.post("/generate", body)]
    assert together == [constrained, *alone]
