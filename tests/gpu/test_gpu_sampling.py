"""Sampled requests on a GPU: seeds, distributions, and the graphs that their rounds take.

Both servers run in fp32, so that they compute the same probabilities. Every test has a twin for the CPU, smaller and
left to `make test-all`, which shows that the test itself works.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.equality import NEAR_TIE
from benchmarks.common.greedy import load_prompts
from benchmarks.common.reference import Reference
from benchmarks.common.setups import SETUPS
from benchmarks.parity.seeded import IN_FLIGHT, SEEDED, cases, collect, first_difference, tokens_and_rounds
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar
from tests.e2e.helpers import Reply, generate, prompt_of
from tests.e2e.serving import paths_since, rounds_by_path
from tests.sampling import same_source

FALSE_ALARM = 1e-6
LENGTH = 5
AT_ONCE = 32
# "It was a", alone: of what follows nano is not sure.
PROMPT = (427, 666, 278)
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.9},
    "top_k": {"temperature": 1.3, "top_k": 8},
    "top_p": {"temperature": 0.9, "top_p": 0.5},
    "min_p": {"temperature": 1.2, "min_p": 0.2},
    "top_k and top_p": {"temperature": 1.2, "top_k": 12, "top_p": 0.6},
    "all": {"temperature": 1.2, "top_k": 10, "top_p": 0.9, "min_p": 0.1},
}


@dataclass(frozen=True)
class Bench:
    """A device: the setup of `benchmarks.parity`, how much to ask there, and the paths of rounds."""

    setup: str
    prompts: int
    samples: int
    sampled_path: str
    greedy_path: str
    args: tuple[str, ...] = ()


BENCHES = {
    # As many running requests as the setup allows have graphs.
    "cuda": Bench("triton-fp32", 9, 1536, "split", "graph", ("--cuda-graph-max-bs-decode", "48")),
    "cpu": Bench("cpu", 2, 160, "eager", "eager"),
}


@pytest.fixture(
    scope="module", params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
)
def bench(request: pytest.FixtureRequest) -> Bench:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the GPU's twin runs here")
    return BENCHES[request.param]


@pytest.fixture(scope="module")
def ar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_ar(NANO, tmp_path_factory.mktemp("plain") / "nano-ar")


def test_seeded_answers_are_those_of_plain_sglang_alone(bench: Bench, ar: Path) -> None:
    """Token by token, but for one difference that rounding decides: eight kinds of requests and greedy ones."""
    setup = SETUPS[bench.setup]
    prompts = load_prompts(NANO, 9)[-bench.prompts :]
    requests = cases(prompts, seeds=(7,))
    args = (*setup.args, *SEEDED, "--enable-metrics")
    with Server(NANO, *ORTHRUS_ARGS, *args, env=setup.env) as server:
        ours = collect(server, requests, IN_FLIGHT, 48, "seeded")
        # Greedy requests may have been left alone in a batch.
        assert {bench.sampled_path} <= set(rounds_by_path(server)) <= {bench.sampled_path, bench.greedy_path}
    with Server(ar, *args, env={**plain_env(), **setup.env}) as server:
        theirs = collect(server, requests, 1, 48, "plain")
    reference = Reference(NANO)
    triples = zip(requests, theirs, ours, strict=True)
    differences = [found for triple in triples if (found := first_difference(reference, *triple)) is not None]
    assert len(differences) <= 1, differences
    assert all(found["margin"] is not None and found["margin"] < NEAR_TIE for found in differences), differences
    tokens, rounds = map(sum, zip(*tokens_and_rounds(requests, ours).values(), strict=True))
    assert tokens / rounds > 2
    assert len({answer.tokens for answer in ours}) > len(prompts), "seeds and filters make a difference"


@pytest.fixture(scope="module")
def served(bench: Bench) -> Iterator[Server]:
    setup = SETUPS[bench.setup]
    with Server(NANO, *ORTHRUS_ARGS, *setup.args, *bench.args, "--enable-metrics", env=setup.env) as server:
        yield server


@pytest.fixture(scope="module")
def samples(bench: Bench, served: Server, ar: Path) -> dict[str, tuple[list[Reply], list[Reply]]]:
    """By kind of request, ours and plain SGLang's. Ours have neighbours of all kinds.

    Plain SGLang is asked for one kind at a time: with FlashInfer, min-p anywhere in a batch changes the order of
    filters for all of it.
    """
    repeats = bench.samples // AT_ONCE

    def ask(server: Server, options: dict[str, Any]) -> list[Reply]:
        sampling = {"max_new_tokens": LENGTH, "ignore_eos": True, "n": AT_ONCE, **options}
        return server.post("/generate", {"input_ids": list(PROMPT), "sampling_params": sampling})

    kinds = list(OPTIONS.values())
    before = rounds_by_path(served)
    with ThreadPoolExecutor(2 * len(kinds)) as pool:
        ours = list(pool.map(partial(ask, served), kinds * repeats))
    assert paths_since(served, before) == {bench.sampled_path}
    setup = SETUPS[bench.setup]
    theirs = []
    with Server(ar, *setup.args, env={**plain_env(), **setup.env}) as server, ThreadPoolExecutor(2) as pool:
        for options in kinds:
            theirs.append([reply for asked in pool.map(partial(ask, server), [options] * repeats) for reply in asked])
    return {
        name: ([reply for asked in ours[kind :: len(kinds)] for reply in asked], theirs[kind])
        for kind, name in enumerate(OPTIONS)
    }


def misfits(ours: list[Reply], theirs: list[Reply]) -> list[float]:
    """p-values for every token, and for pairs of neighbours after the first, which comes from the prefill."""
    texts: list[list[Any]] = [[reply["output_ids"] for reply in replies] for replies in (ours, theirs)]
    tokens = [[[text[place] for text in side] for side in texts] for place in range(LENGTH)]
    pairs = [
        [list(zip(*both, strict=True)) for both in zip(*neighbours, strict=True)] for neighbours in pairwise(tokens[1:])
    ]
    return [same_source(mine, other) for mine, other in (*tokens, *pairs)]


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_follow_plain_sglangs_distribution(
    samples: dict[str, tuple[list[Reply], list[Reply]]], bench: Bench, name: str
) -> None:
    """A correct server fails one of these with probability 8e-6: eight comparisons of two samples."""
    ours, theirs = samples[name]
    assert len(ours) == len(theirs) == bench.samples
    assert len({tuple(reply["output_ids"]) for reply in ours}) > bench.samples / 32
    found = misfits(ours, theirs)
    assert min(found) > FALSE_ALARM, found
    rounds = {reply["meta_info"]["spec_verify_ct"] for reply in ours}
    assert min(rounds) < LENGTH - 1 and max(rounds) > 1, "drafts were accepted, and rounds follow on one another"


@pytest.mark.parametrize("pair", [("temperature", "top_p"), ("top_k", "min_p")], ids=" or ".join)
def test_the_test_notices_other_filters(
    samples: dict[str, tuple[list[Reply], list[Reply]]], bench: Bench, pair: tuple[str, str]
) -> None:
    if pair == ("top_k", "min_p") and bench.samples < 1000:
        pytest.skip("takes more samples")
    (ours, _), (_, theirs) = (samples[name] for name in pair)
    of_prefill, *found = misfits(ours, theirs)
    assert of_prefill < FALSE_ALARM and min(found) < FALSE_ALARM


def test_sampled_rounds_take_two_graphs_and_greedy_ones_one(served: Server, bench: Bench) -> None:
    ids = prompt_of("prose")
    for options, path in (({"temperature": 1.0, "top_p": 0.9}, bench.sampled_path), ({}, bench.greedy_path)):
        before = rounds_by_path(served)
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _, options=options: generate(served, ids, 24, **options), range(4)))
        assert all(len(reply["output_ids"]) > 1 for reply in replies)
        assert paths_since(served, before) == {path}
