"""The graph runner on a CPU, where captured functions stand in for CUDA graphs (`tests.e2e.graph_replay`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.conftest import SETUP, TEST_ARGS
from tests.e2e.helpers import assert_same_output, generate, generate_together, prompt_of, prompts, tokens_per_cycle
from tests.e2e.serving import paths_since, rounds_by_path

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def with_graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which the stand-in is installed as a plugin."""
    folder = tmp_path_factory.mktemp("site")
    metadata = folder / "graph_replay-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: graph-replay\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\ngraph_replay = tests.e2e.graph_replay:register\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))}


@pytest.fixture(scope="module")
def served(with_graphs: dict[str, str]) -> Iterator[Server]:
    args = (*ORTHRUS_ARGS, *TEST_ARGS, "--decode-log-interval", "1")
    with Server(NANO, *args, env={**with_graphs, **SETUP.env}) as server:
        yield server


@pytest.fixture(scope="module")
def narrow(with_graphs: dict[str, str]) -> Iterator[Server]:
    args = (*ORTHRUS_ARGS, *TEST_ARGS, "--speculative-num-draft-tokens", "12")
    with Server(NANO, *args, env={**with_graphs, **SETUP.env}) as server:
        yield server


def test_a_round_is_one_graph(served: Server, orthrus: Server, plain: Server, reference: Reference) -> None:
    before = rounds_by_path(served)
    for prompt in prompts()[::6]:
        reply = generate(served, prompt.ids, 64)
        assert_same_output(reference, prompt.ids, generate(plain, prompt.ids, 64), reply)
        assert tokens_per_cycle(reply) == tokens_per_cycle(generate(orthrus, prompt.ids, 64))
    assert paths_since(served, before) == {"graph"}
    assert "ORTHRUS rounds: 1 in one CUDA graph, 0 in two, 0 eager" in served.log_path.read_text()


@pytest.mark.parametrize(("in_flight", "paths"), [(2, {"graph"}), (4, {"graph"}), (6, {"graph", "eager"})])
def test_a_batch_is_padded_to_a_captured_size(
    served: Server, plain: Server, reference: Reference, in_flight: int, paths: set[str]
) -> None:
    """Sizes 1 and 4 are captured; requests of unlike lengths come and go."""
    before = rounds_by_path(served)
    requests = [(prompt.ids, 16 + 8 * index) for index, prompt in enumerate(prompts()[1::4])]
    replies = generate_together(served, requests, in_flight)
    for (ids, limit), reply in zip(requests, replies, strict=True):
        assert_same_output(reference, ids, generate(plain, ids, limit), reply)
    assert paths_since(served, before) == paths
    rounds_per_reply = [tokens_per_cycle(reply) for reply in replies]
    assert sum(rounds_per_reply) / len(rounds_per_reply) > 3


def test_a_grammar_takes_a_graph_for_each_pass(served: Server, plain: Server, reference: Reference) -> None:
    ids = prompt_of("json")
    schema = json.dumps({"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]})
    before = rounds_by_path(served)
    replies = [generate(server, ids, 64, json_schema=schema) for server in (plain, served)]
    assert replies[0]["output_ids"] == replies[1]["output_ids"]
    assert json.loads(replies[1]["text"])["id"] >= 0
    assert paths_since(served, before) == {"split"}


def test_sampled_rounds_take_a_graph_for_each_pass(served: Server) -> None:
    for options, path in (({"temperature": 1.0, "top_p": 0.9}, "split"), ({}, "graph")):
        before = rounds_by_path(served)
        assert len(generate(served, prompt_of("prose"), 24, **options)["output_ids"]) > 1
        assert paths_since(served, before) == {path}


@pytest.mark.slow
def test_narrow_blocks_are_one_graph_a_round(narrow: Server, plain: Server, reference: Reference) -> None:
    before = rounds_by_path(narrow)
    requests = [(prompt.ids, 48) for prompt in prompts()[2::6]]
    replies = generate_together(narrow, requests, 2)
    for (ids, limit), reply in zip(requests, replies, strict=True):
        assert_same_output(reference, ids, generate(plain, ids, limit), reply)
        assert 1.5 < tokens_per_cycle(reply) <= 12
    assert paths_since(narrow, before) == {"graph"}
