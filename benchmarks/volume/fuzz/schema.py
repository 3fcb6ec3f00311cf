"""Hostile requests by schemathesis, from the server's own OpenAPI schema, and JSON of any shape by hypothesis.

Both packages come with the extra `fuzz`. They are imported here only, so `--own-only` runs without them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import schemathesis
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from benchmarks.volume.fuzz.requests import BASES, Hostile, encoded

_SETTINGS: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
    "phases": [hypothesis.Phase.generate],
    "report_multiple_bugs": False,
    "verbosity": hypothesis.Verbosity.quiet,
}


_REFERENCES = 2


def from_schema(spec: dict[str, Any], seed: int, count: int, first: int) -> list[Hostile]:
    """`count` requests or fewer, both valid and not by the schema, spread over its generating operations."""
    found: list[Hostile] = []
    results = schemathesis.openapi.from_dict(shallow(spec)).get_all_operations()
    found_operations = [result.ok() for result in results if isinstance(result, Ok)]
    # Aborts of everything would end other clients' requests on purpose.
    paths = BASES.keys() - {"/abort_request"}
    operations = [one for one in found_operations if one.method.upper() == "POST" and one.path in paths]
    for operation in operations:
        for mode in (GenerationMode.NEGATIVE, GenerationMode.POSITIVE):
            share = -(-count // (2 * len(operations)))

            def keep(case: Any, path: str = operation.path, mode: GenerationMode = mode) -> None:
                number = first + len(found)
                kind = f"{path} schema, {mode.value}"
                found.append(Hostile(number, kind, path, _payload(case.body), source="schemathesis"))

            _draw(operation.as_strategy(generation_mode=mode), keep, seed, share)
    return found[:count]


def shallow(spec: dict[str, Any]) -> dict[str, Any]:
    """The same interfaces with references followed twice and no further, where anything may stand.

    With all of SGLang's recursive message and format types, schemathesis takes minutes for one chat request.
    """
    components = spec.get("components", {}).get("schemas", {})
    paths = {
        path: {
            method: operation | {"requestBody": _cut(operation["requestBody"], components, _REFERENCES)}
            for method, operation in operations.items()
            if isinstance(operation, dict) and "requestBody" in operation
        }
        for path, operations in spec["paths"].items()
        if path in BASES
    }
    return {"openapi": spec["openapi"], "info": spec["info"], "paths": paths}


def _cut(node: Any, components: dict[str, Any], references: int) -> Any:
    if isinstance(node, list):
        return [_cut(item, components, references) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        if not references:
            return {}
        return _cut(components[node["$ref"].rpartition("/")[2]], components, references - 1)
    dropped = ("description", "title", "examples", "default", "deprecated", "discriminator")
    kept = {key: value for key, value in node.items() if key not in dropped or isinstance(value, dict)}
    return {key: _cut(value, components, references) for key, value in kept.items()}


def any_json(seed: int, count: int, first: int) -> list[Hostile]:
    """`count` requests in which hypothesis fills a field of the interface, or replaces the body."""
    found: list[Hostile] = []
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters())
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
    paths = st.sampled_from(sorted(BASES))

    def keep(case: tuple[str, Any, int]) -> None:
        path, value, where = case
        body: Any = json.loads(json.dumps(BASES[path]))
        names = sorted(body)
        if where < len(names):
            body[names[where]] = value
        elif isinstance(value, dict):
            body |= value
        else:
            body = value
        found.append(Hostile(first + len(found), f"{path} any JSON", path, encoded(body), source="hypothesis"))

    _draw(st.tuples(paths, values, st.integers(0, 7)), keep, seed, count)
    return found[:count]


def _draw(strategy: Any, keep: Callable[[Any], None], seed: int, count: int) -> None:
    """Give `keep` that many examples. What a strategy can't produce is left out."""

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, **_SETTINGS)
    @hypothesis.given(strategy)
    def example(case: Any) -> None:
        keep(case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            example()
        except (
            hypothesis.errors.Unsatisfiable,
            hypothesis.errors.InvalidArgument,
            schemathesis.errors.SchemathesisError,
        ):
            return


def _payload(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    try:
        return encoded(body)
    except (TypeError, ValueError):
        return repr(body).encode(errors="replace")
