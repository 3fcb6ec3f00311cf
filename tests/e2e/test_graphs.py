"""The graph runner on a CPU, where captured functions stand in for CUDA graphs (`tests.e2e.graph_replay`)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import (
    assert_same_output,
    assert_same_outputs,
    both,
    generate,
    generate_together,
    prompt_of,
    prompts,
    tokens_per_cycle,
)
from tests.e2e.serving import paths_since, rounds_by_path
from tests.servers import SETUP, TEST_ARGS, replayed_graphs

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def narrow_with_graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = (*ORTHRUS_ARGS, *TEST_ARGS, "--speculative-num-draft-tokens", "12")
    with Server(NANO, *args, env={**SETUP.env, **replayed_graphs(tmp_path_factory.mktemp("site"))}) as server:
        yield server


def test_a_round_is_one_graph(small: Server, orthrus: Server, plain: Server, reference: Reference) -> None:
    before = rounds_by_path(small)
    requests = [(prompt.ids, 64) for prompt in prompts()[::6]]
    replies, eager = (generate_together(server, requests, 1) for server in (small, orthrus))
    assert_same_outputs(reference, plain, requests, replies)
    assert list(map(tokens_per_cycle, replies)) == list(map(tokens_per_cycle, eager))
    assert paths_since(small, before) == {"graph"}
    num_rounds = rounds_by_path(small)["graph"] - before.get("graph", 0)
    assert num_rounds == sum(reply["meta_info"]["spec_verify_ct"] for reply in replies), "none for an ended text"
    assert "ORTHRUS rounds: 1 in one CUDA graph, 0 in two, 0 eager" in small.log_path.read_text()


@pytest.mark.parametrize(("in_flight", "paths"), [(2, {"graph"}), (4, {"graph"}), (6, {"graph", "eager"})])
def test_a_batch_is_padded_to_a_captured_size(
    small: Server, plain: Server, reference: Reference, in_flight: int, paths: set[str]
) -> None:
    """Sizes 1 and 4 are captured; requests of unlike lengths come and go."""
    before = rounds_by_path(small)
    requests = [(prompt.ids, 16 + 8 * index) for index, prompt in enumerate(prompts()[1::4])]
    replies = generate_together(small, requests, in_flight)
    assert_same_outputs(reference, plain, requests, replies)
    assert paths_since(small, before) == paths
    rounds_per_reply = [tokens_per_cycle(reply) for reply in replies]
    assert sum(rounds_per_reply) / len(rounds_per_reply) > 3


def test_a_grammar_takes_a_graph_for_each_pass(small: Server, plain: Server, reference: Reference) -> None:
    ids = prompt_of("json")
    before = rounds_by_path(small)
    replies = both(generate, (plain, small), ids, 64, regex=r'\{"id": [0-9]{1,6}\}')
    assert replies[0]["output_ids"] == replies[1]["output_ids"]
    assert json.loads(replies[1]["text"])["id"] >= 0
    assert paths_since(small, before) == {"split"}


def test_sampled_rounds_take_a_graph_for_each_pass(small: Server) -> None:
    for options, path in (({"temperature": 1.0, "top_k": -1, "top_p": 0.9}, "split"), ({}, "graph")):
        before = rounds_by_path(small)
        assert len(generate(small, prompt_of("prose"), 24, **options)["output_ids"]) > 1
        assert paths_since(small, before) == {path}


@pytest.mark.slow
def test_narrow_blocks_are_one_graph_a_round(narrow_with_graphs: Server, plain: Server, reference: Reference) -> None:
    before = rounds_by_path(narrow_with_graphs)
    requests = [(prompt.ids, 48) for prompt in prompts()[2::6]]
    replies = generate_together(narrow_with_graphs, requests, 2)
    for (ids, limit), reply in zip(requests, replies, strict=True):
        assert_same_output(reference, ids, generate(plain, ids, limit), reply)
        assert 1.5 < tokens_per_cycle(reply) <= 12
    assert paths_since(narrow_with_graphs, before) == {"graph"}
