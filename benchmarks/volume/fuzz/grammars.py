"""Hostile grammars: valid, invalid, recursive, huge, degenerate. Pure and seeded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from benchmarks.volume.fuzz.values import TEXTS, value

Constraint = dict[str, Any]
"""As sampling parameters of `/generate`: one of json_schema, regex, ebnf, structural_tag."""

_EBNF: tuple[str, ...] = (
    'root ::= "a" root',
    'root ::= "a" root | ""',
    'root ::= root "a"',
    'root ::= root "a" | "a"',
    "root ::= root",
    "root ::= a\na ::= b\nb ::= a",
    'root ::= a b\na ::= "x" b\nb ::= "y" a',
    'root ::= ""',
    'root ::= "" | "" | ""',
    "root ::= ",
    "",
    "root",
    "not a grammar",
    'start ::= "a"',
    'root ::= "a"\nroot ::= "b"',
    "root ::= undefined",
    'root ::= "a',
    "root ::= [",
    "root ::= []",
    "root ::= [z-a]",
    "root ::= [^\\x00-\\U0010ffff]",
    "root ::= [\\ud800-\\udfff]",
    'root ::= ("a" | )',
    'root ::= ("a"*)*',
    'root ::= (("a"*)*)*',
    'root ::= ("a"?){1000}',
    'root ::= "a"{0}',
    'root ::= "a"{3,1}',
    'root ::= "a"{-1}',
    'root ::= "a"{2000000}',
    'root ::= "a"{99999999999999999999}',
    "root ::= [a-z]{0,5000}",
    'root ::= "\\x00"+',
    'root ::= "\u00e9"+ | "\U0001f600"+',
    'root ::= "\\xff\\xfe"',
    'root ::= (= "a") "a"',
    "# only a comment",
    'root ::= "<|im_end|>"+',
    'root ::= "<think>" root "</think>" | "x"',
)
_REGEX: tuple[str, ...] = (
    *("", "a", ".*", ".*.*.*.*x", "(a*)*b", "(a|a)*b", "(a|aa)+$", "^$", "^a$", "$a", "a^", "()", "(|)", "(|a)*"),
    *(
        "[",
        "]",
        "(",
        ")",
        "*",
        "+a",
        "?",
        "a{",
        "a{1",
        "a{,3}",
        "a{3,1}",
        "a{0}",
        "a{-1}",
        "a**",
        "\\",
        "\\1",
        "(a)\\1",
    ),
    *(
        "(?=a)b",
        "(?!a)b",
        "(?<=a)b",
        "(?i)a",
        "(?P<n>a)(?P=n)",
        "\\p{L}+",
        "\\d{3,}",
        "[^\\s\\S]",
        "[\\s\\S]*",
        "[z-a]",
    ),
    *(
        "\\ud800",
        "[\\ud800-\\udfff]",
        "\\x00+",
        "[^\\x00-\\U0010ffff]",
        "\U0001f600+",
        "\\Bx",
        "a{65536}",
        "a{2000000}",
    ),
    *(
        "a{100000000}",
        "a{99999999999999999999}",
        "(a{1000}){1000}",
        "((a{50}){50}){50}",
        "[ab]{500}c",
        "(.{0,200}){20}",
    ),
)
_SCHEMAS: tuple[Any, ...] = (
    *({}, True, False, [], None, 1, "x", {"type": "wrong"}, {"type": []}, {"type": ["integer", "null"]}, {"not": {}}),
    *({"enum": []}, {"enum": [None]}, {"const": {}}, {"const": "a" * 10_000}, {"const": "a" * 100_000}, {"anyOf": []}),
    *({"allOf": []}, {"oneOf": [{}, {}]}, {"$ref": "#"}, {"$ref": "#/nowhere"}, {"$ref": "http://x/y"}, {"$ref": 5}),
    {"anyOf": [{"$ref": "#"}]},
    {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"$ref": "#"}], "items": False, "minItems": 1},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "integer", "minimum": 10, "maximum": 1},
    {"type": "integer", "minimum": 0, "maximum": 10**30},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63},
    {"type": "integer", "multipleOf": 0},
    {"type": "number", "minimum": 1e308, "exclusiveMaximum": 1e-308},
    {"type": "string", "minLength": 5, "maxLength": 2},
    {"type": "string", "maxLength": -1},
    {"type": "string", "minLength": 100_000},
    {"type": "string", "maxLength": 2_000_000},
    {"type": "string", "pattern": "["},
    {"type": "string", "pattern": "(a*)*b"},
    {"type": "string", "format": "nothing"},
    {"type": "array", "minItems": 3, "maxItems": 1},
    {"type": "array", "minItems": 100_000},
    {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}, "minItems": 9},
    {"type": "object", "required": ["missing"], "additionalProperties": False},
    {"type": "object", "minProperties": 9, "maxProperties": 1},
    {"type": "object", "patternProperties": {"[": {}}},
    {"type": "object", "properties": {"": {"type": "null"}, "\u0000": {}, "\ud800": {"type": "null"}}},
    {"if": {"type": "null"}, "then": False, "else": False},
)


def _deep_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


@cache
def _large_schema() -> str:
    """A megabyte."""
    properties = {f"field_{number}": {"type": "string", "enum": ["a" * 40, "b" * 40]} for number in range(9000)}
    return json.dumps({"type": "object", "properties": properties, "required": list(properties)})


def _union(random: Random) -> Constraint:
    count = random.choice((1000, 5000))
    texts = [f"{random.randrange(10**9):09d}" for _ in range(count)]
    name = random.choice(("regex", "ebnf", "enum", "anyOf"))
    if name == "regex":
        return {name: "(" + "|".join(texts) + ")"}
    if name == "ebnf":
        return {name: "root ::= " + " | ".join(f'"{text}"' for text in texts)}
    return {"json_schema": json.dumps({name: texts if name == "enum" else [{"const": text} for text in texts]})}


def _nested(random: Random) -> Constraint:
    depth = random.choice((20, 200, 2000))
    return random.choice(
        (
            {"regex": "(" * depth + "a" + ")" * depth},
            {"regex": "(" * depth + "a" + ")*" * depth},
            {"ebnf": "root ::= " + "(" * depth + '"a"' + ")" * depth},
            {"json_schema": json.dumps(_deep_schema(min(depth, 300)))},
            {"json_schema": '{"items":' * depth + "{}" + "}" * depth},
            {"json_schema": '{"type":"array","items":' * depth},
        )
    )


def _text(random: Random) -> Constraint:
    """Any text as a constraint."""
    name = random.choice(("json_schema", "regex", "ebnf", "structural_tag"))
    return {name: random.choice(TEXTS)}


def _broken(random: Random) -> Constraint:
    """A list's grammar with a character changed, cut or doubled."""
    name, texts = random.choice((("ebnf", _EBNF), ("regex", _REGEX)))
    text = random.choice(texts)
    at = random.randrange(len(text) + 1)
    middle = random.choice(("", "(", ")", "[", "|", "{", "}", "\\", '"', "\n", "\u00e9", text[at : at + 3]))
    return {name: text[:at] + middle + text[at + random.randrange(3) :]}


def _tag(random: Random) -> Constraint:
    tag: dict[str, Any] = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": random.choice(_SCHEMAS), "end": "</f>"}],
        "triggers": ["<f"],
    }
    many = tag["structures"] * 50
    for key in random.sample(sorted(tag), random.randrange(3)):
        tag[key] = random.choice((value(random), [], [""], ["a", "a"], many))
    return {"structural_tag": random.choice((json.dumps(tag), tag))}


def _typed(random: Random) -> Constraint:
    """Something that is no text."""
    return {random.choice(("json_schema", "regex", "ebnf", "structural_tag")): value(random)}


def _two(random: Random) -> Constraint:
    return {"regex": "a", "ebnf": 'root ::= "a"', "json_schema": "{}"}


_MAKERS: tuple[tuple[str, int, Callable[[Random], Constraint]], ...] = (
    ("ebnf", 24, lambda random: {"ebnf": random.choice(_EBNF)}),
    ("regex", 24, lambda random: {"regex": random.choice(_REGEX)}),
    ("schema", 28, lambda random: {"json_schema": json.dumps(random.choice(_SCHEMAS))}),
    ("broken", 8, _broken),
    ("union", 2, _union),
    ("nested", 4, _nested),
    ("large schema", 1, lambda random: {"json_schema": _large_schema()}),
    ("text", 4, _text),
    ("tag", 6, _tag),
    ("typed", 4, _typed),
    ("two", 1, _two),
)


def constraint(random: Random) -> tuple[str, Constraint]:
    """A hostile grammar, and what kind it is of."""
    name, _, make = random.choices(_MAKERS, [weight for _, weight, _ in _MAKERS])[0]
    return name, make(random)


def schema(random: Random) -> Any:
    """A hostile JSON schema, decoded."""
    return random.choice((random.choice(_SCHEMAS), _deep_schema(random.choice((5, 60)))))
