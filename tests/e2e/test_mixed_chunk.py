"""`--enable-mixed-chunk`: running requests get a token each from others' prefills, and say what they say alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from sglang.srt.sampling.custom_logit_processor import DeepseekOCRNoRepeatNGramLogitProcessor as NoRepeat

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import Reply, assert_same_output, generate, prompt_of, truth
from tests.e2e.serving import assert_nothing_leaked, gauge, rounds_by_path, wait_until
from tests.servers import GAUGES, MEMORY_CHECKS, OPTIMISTIC, SETUP, TEST_ARGS, WITHOUT_OVERLAP

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CHUNK = 64
MIXED_ARGS = ("--enable-mixed-chunk", "--chunked-prefill-size", str(CHUNK))
# On a CPU SGLang has no radix cache under this flag, without which seeds do not count.
SEEDS = ("--enable-deterministic-inference",)
POOL = 1792  # tokens: too few for all
SETS = {"overlap": SEEDS, "no overlap": (*SEEDS, WITHOUT_OVERLAP), "small pool": ("--max-total-tokens", str(POOL))}
LENGTH = 160
REGEX = "([a-f][0-9]){70}"  # a mask of another position is wrong
PROMPT_LEN, LATECOMERS = 600, 6
PENALTIES = {"frequency_penalty": 0.4, "presence_penalty": -0.3, "repetition_penalty": 1.2, "min_new_tokens": 80}
CONSTRAINED = {"regex": REGEX, "ignore_eos": False}


class Asked(NamedTuple):
    """A request: a prompt's family and number, sampling parameters, and a custom logit processor."""

    family: str
    number: int
    sampling: dict[str, Any]
    processor: str | None = None

    def send(self, server: Server) -> Reply:
        sampling = {"temperature": 0, "max_new_tokens": LENGTH, "ignore_eos": True, **self.sampling}
        body = {"input_ids": list(prompt_of(self.family, self.number)), "sampling_params": sampling}
        return server.post("/generate", body | {"custom_logit_processor": self.processor})


GREEDY = (Asked("prose", 0, {}), Asked("json", 1, {}))
RUNNERS = {
    "seeded": Asked("prose", 1, {"temperature": 1.3, "sampling_seed": 11}),
    "seeded and filtered": Asked("chat", 0, {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "sampling_seed": 5}),
    "penalised": Asked("prose", 2, {**PENALTIES, "logit_bias": {"300": 2.0}}),
    "seeded and penalised": Asked("code", 0, {**PENALTIES, "temperature": 1.2, "sampling_seed": 3}),
    "constrained": Asked("chat", 1, CONSTRAINED),
    "constrained and seeded": Asked("chat", 2, {**CONSTRAINED, "temperature": 1.5, "sampling_seed": 7}),
    "processed": Asked("code", 1, {"custom_params": {"ngram_size": 2, "window_size": 12}}, NoRepeat().to_str()),
}


@pytest.fixture(scope="module", params=SETS)
def mixing(request: pytest.FixtureRequest) -> Iterator[Server]:
    args = (*ORTHRUS_ARGS, *TEST_ARGS, *GAUGES, *MIXED_ARGS, *SETS[request.param])
    with Server(NANO, *args, env={**SETUP.env, **MEMORY_CHECKS, **OPTIMISTIC}, timeout=600) as server:
        yield server


def long_prompt(number: int) -> list[int]:
    """One that shares no beginning with others."""
    ids = [*prompt_of("think"), *prompt_of("tools", 2), *prompt_of("qa", 1)]
    return [*prompt_of("arith", number % 4), *ids[number:]][:PROMPT_LEN]


def num_mixed(server: Server) -> int:
    """Prefills so far that took running requests along."""
    return rounds_by_path(server)["mixed"]


def mixed_tokens(reply: Reply) -> int:
    """Tokens that a request got from others' prefills: neither from its own nor from rounds."""
    meta = reply["meta_info"]
    return int(meta["completion_tokens"] - 1 - meta["spec_verify_ct"] - meta["spec_num_correct_drafts"])


def run_while_others_arrive(server: Server, asked: Sequence[Asked]) -> tuple[list[Reply], list[Reply]]:
    """These requests, and long prompts that are prefilled while they run. Answers to both."""
    with ThreadPoolExecutor(len(asked)) as runners, ThreadPoolExecutor(3) as latecomers:
        running: list[Future[Reply]] = [runners.submit(one.send, server) for one in asked]
        wait_until(lambda: gauge(server, "num_running_reqs") == len(asked), running[0])
        late = list(latecomers.map(lambda number: generate(server, long_prompt(number), 24), range(LATECOMERS)))
        return [one.result() for one in running], late


def test_texts_are_those_of_requests_alone(mixing: Server, plain: Server, reference: Reference) -> None:
    is_small = "--max-total-tokens" in mixing.command
    runners = {name: one for name, one in RUNNERS.items() if not (is_small and "seeded" in name)}
    alone = {name: one.send(mixing) for name, one in runners.items()}
    assert num_mixed(mixing) == 0, "nobody else was there"
    mixing.get("/flush_cache?timeout=30")

    replies, late = run_while_others_arrive(mixing, (*GREEDY, *runners.values()))
    assert num_mixed(mixing) > LATECOMERS * PROMPT_LEN / CHUNK / 2
    for one, reply in zip(GREEDY, replies, strict=False):
        assert_same_output(reference, prompt_of(one.family, one.number), one.send(plain), reply)
    for (name, expected), reply in zip(alone.items(), replies[len(GREEDY) :], strict=True):
        assert reply["output_ids"] == expected["output_ids"], name
        assert reply["meta_info"]["finish_reason"] == expected["meta_info"]["finish_reason"], name
        if "constrained" in name:
            assert re.fullmatch(REGEX, reply["text"])
    for number, reply in enumerate(late):
        assert_same_output(reference, long_prompt(number), truth(plain, long_prompt(number), 24), reply)
    assert all(mixed_tokens(reply) > 0 for reply in replies)
    assert accepted_per_round(replies[len(GREEDY) :]) > 0.6 * accepted_per_round(alone.values())
    if is_small:
        assert any(reply["meta_info"]["num_retractions"] for reply in (*replies, *late))
        assert_is_continued(mixing, plain, reference, long_prompt(LATECOMERS - 1), late[-1])
    assert_nothing_leaked(mixing)


def accepted_per_round(replies: Iterable[Reply]) -> float:
    """Drafts: a drafter that reads a wrong anchor or wrong slots is silent otherwise."""
    metas = [reply["meta_info"] for reply in replies]
    return float(sum(meta["spec_num_correct_drafts"] for meta in metas) / sum(meta["spec_verify_ct"] for meta in metas))


def assert_is_continued(server: Server, plain: Server, reference: Reference, ids: Sequence[int], reply: Reply) -> None:
    """What a mixed step left in the radix tree is the AR view's."""
    longer = [*ids, *reply["output_ids"]]
    again = generate(server, longer, 32)
    assert again["meta_info"]["cached_tokens"] >= len(longer) - 2
    assert_same_output(reference, longer, truth(plain, longer, 32), again)
