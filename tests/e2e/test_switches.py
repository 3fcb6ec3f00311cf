"""Server arguments that change scheduling or the cache: texts stay plain SGLang's (`docs/switches.md` lists all)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
import requests

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar
from tests.e2e.helpers import (
    assert_same_output,
    assert_same_outputs,
    both,
    generate,
    generate_together,
    prompt_of,
    prompts,
    tokens_per_cycle,
    truth,
)
from tests.e2e.serving import assert_nothing_leaked, gauge, streaming, wait_until
from tests.servers import CORE_FOR_EACH_RANK, GAUGES, MEMORY_CHECKS, SETUP, TEST_ARGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SETS = {
    "scheduling": (
        *("--schedule-policy", "lof", "--schedule-conservativeness", "0.3", "--max-queued-requests", "64"),
        *("--num-continuous-decode-steps", "3", "--scheduler-recv-interval", "2", "--prefill-max-requests", "2"),
    ),
    "prefills": (
        *("--disable-radix-cache", "--chunked-prefill-size", "-1", "--max-prefill-tokens", "512"),
        *("--prefill-decode-interval", "4", "--prefill-decode-interval-min-bs", "2"),
        *("--min-free-slots-delay", "2", "--max-running-requests", "6"),
    ),
    "cache": (
        *("--radix-eviction-policy", "lfu", "--page-size", "64", "--max-total-tokens", "4096"),
        *("--enable-priority-scheduling", "--retraction-policy", "priority", "--disable-priority-preemption"),
        *("--default-priority-value", "3", "--schedule-low-priority-values-first"),
    ),
    "fcfs": (
        *("--schedule-policy", "fcfs", "--radix-eviction-policy", "slru", "--chunked-prefill-size", "32"),
        *("--radix-eviction-policy-config", '{"protected_threshold": 4}', "--abort-on-priority-when-disabled"),
        *("--disable-tokenizer-batch-decode", "--enable-tokenizer-batch-encode", "--batch-notify-size", "4"),
    ),
}
REPLICAS = ("--dp-size", "2", "--load-balance-method", "round_robin")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
KEY, NAME = "a-key", "house"
LONG = 600


@pytest.fixture(scope="module", params=SETS)
def switched(request: pytest.FixtureRequest) -> Iterator[Server]:
    args = (*ORTHRUS_ARGS, *TEST_ARGS, *GAUGES, *SETS[request.param])
    with Server(NANO, *args, env={**SETUP.env, **MEMORY_CHECKS}, timeout=600) as server:
        yield server


@pytest.fixture(scope="module")
def replicas() -> Iterator[Server]:
    env = {**SETUP.env, **CORE_FOR_EACH_RANK}
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *GAUGES, *REPLICAS, env=env, timeout=600) as server:
        yield server


@pytest.mark.parametrize("in_flight", [1, 8])
def test_texts_are_plain_sglangs(switched: Server, plain: Server, reference: Reference, in_flight: int) -> None:
    wanted = [(prompt.ids, 96) for prompt in prompts()[in_flight % 2 :: 3]]
    replies = generate_together(switched, wanted, in_flight)
    assert_same_outputs(reference, plain, wanted, replies)
    cycles = [tokens_per_cycle(reply) for reply in replies if len(reply["output_ids"]) > 40]
    assert sum(cycles) / len(cycles) > 4
    assert_nothing_leaked(switched)


def test_grammars_hold(switched: Server, orthrus: Server) -> None:
    for family in ("json", "chat"):
        grammar = {"json_schema": json.dumps(SCHEMA)}
        expected, reply = both(generate, (orthrus, switched), prompt_of(family), 48, **grammar)
        assert reply["output_ids"] == expected["output_ids"]


def test_replicas_answer_as_one_server(replicas: Server, plain: Server, reference: Reference) -> None:
    """In turn, so that both of them do."""
    wanted = [(prompt.ids, 96) for prompt in prompts()[::4]]
    replies = generate_together(replicas, wanted, 4)
    assert_same_outputs(reference, plain, wanted, replies)
    assert sum(map(tokens_per_cycle, replies)) / len(replies) > 4
    log = replicas.log_path.read_text()
    assert all(f"DP{rank}" in log for rank in (0, 1))
    ranks = {reply["meta_info"].get("dp_rank") for reply in replies}
    assert ranks == {0, 1}


@pytest.fixture(scope="module")
def two_at_a_time() -> Iterator[Server]:
    """Of several priorities, of which a higher one interrupts a lower one."""
    flags = ("--max-running-requests", "2", "--enable-priority-scheduling", "--stream-interval", "1")
    threshold = ("--priority-scheduling-preemption-threshold", "5")
    with Server(
        NANO, *ORTHRUS_ARGS, *TEST_ARGS, *GAUGES, *flags, *threshold, env={**SETUP.env, **MEMORY_CHECKS}
    ) as server:
        yield server


def test_an_interrupted_request_goes_on_where_it_was(
    two_at_a_time: Server, plain: Server, reference: Reference
) -> None:
    """Two requests fill the batch; the third one is answered first."""
    slow = [prompt_of("prose", number) for number in (0, 1)]
    fast = prompt_of("json")

    def ask(ids: tuple[int, ...], priority: int, length: int) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        body = {"input_ids": list(ids), "sampling_params": sampling, "priority": priority}
        return two_at_a_time.post("/generate", body)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(ask, ids, 0, LONG) for ids in slow]
        wait_until(lambda: gauge(two_at_a_time, "num_running_reqs") == 2, running[0])
        first = pool.submit(ask, fast, 10, 64).result()
        assert not any(one.done() for one in running), "it waited for one of them"
        replies = [one.result() for one in running]
    for ids, reply in [*zip(slow, replies, strict=True), (fast, first)]:
        expected = generate(plain, ids, len(reply["output_ids"]), ignore_eos=True)
        assert_same_output(reference, ids, expected, reply)
    assert_nothing_leaked(two_at_a_time)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """With a key and a name of its own, and few chunks in a stream."""
    flags = ("--api-key", KEY, "--served-model-name", NAME, "--enable-cache-report", "--stream-interval", "40")
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *flags, env=SETUP.env) as server:
        yield server


def test_key_name_and_cache_report(guarded: Server) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "Say hello. " * 30}], "max_tokens": 16}
    url = f"{guarded.url}/v1/chat/completions"
    assert requests.post(url, json=body, timeout=60).status_code == 401
    keyed = {"Authorization": f"Bearer {KEY}"}
    first, second = (requests.post(url, json=body, headers=keyed, timeout=60).json() for _ in range(2))
    assert first["model"] == NAME and first["choices"] and second["choices"][0] == first["choices"][0]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 32
    models = requests.get(f"{guarded.url}/v1/models", headers=keyed, timeout=60).json()
    assert [model["id"] for model in models["data"]] == [NAME]


def test_a_stream_has_a_chunk_per_interval(guarded: Server, plain: Server) -> None:
    """Of rounds of about ten tokens, not of each; and the last chunk has all of the text."""
    ids = prompt_of("code")
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"input_ids": list(ids), "sampling_params": {"temperature": 0, "max_new_tokens": 160}, "stream": True}
    with requests.post(f"{guarded.url}/generate", json=body, headers=headers, stream=True, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line.startswith(b"data: {")]
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    expected = truth(plain, ids, 160)
    assert chunks[-1]["text"] == expected["text"]
    assert 1 < len(chunks) <= 2 + len(expected["output_ids"]) / 40


def test_a_server_without_a_tokenizer_takes_and_gives_ids(plain: Server, reference: Reference) -> None:
    flags = (*ORTHRUS_ARGS, *SETUP.args, "--context-length", "2048", "--skip-tokenizer-init")
    with Server(NANO, *flags, env=SETUP.env) as server:
        for family in ("arith", "prose"):
            ids = prompt_of(family)
            reply = generate(server, ids, 64, ignore_eos=True)
            expected = generate(plain, ids, 64, ignore_eos=True)
            assert_same_output(reference, ids, expected, {**reply, "text": expected["text"]})
            assert tokens_per_cycle(reply) > 2


def test_yarn_reaches_beyond_the_trained_context(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Positions of both views are scaled: plain SGLang with the same setting gives the same text."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1000000.0}
    override = json.dumps({"rope_scaling": scaling, "rope_parameters": scaling, "max_position_embeddings": 16384})
    args = (*SETUP.args, "--context-length", "16384", "--json-model-override-args", override)
    exported = export_ar(NANO, tmp_path_factory.mktemp("yarn") / "ar")
    text = [token for prompt in islice(prompts(), 34) for token in prompt.ids]
    ids = [*(text * 10)[:6000], *prompt_of("json")]
    with (
        Server(exported, *args, env={**SETUP.env, **plain_env()}) as plain,
        Server(NANO, *ORTHRUS_ARGS, *args, env=SETUP.env) as server,
    ):
        for prompt in (tuple(ids), prompt_of("arith")):
            expected, reply = both(generate, (plain, server), prompt, 64, ignore_eos=True)
            assert reply["output_ids"] == expected["output_ids"]
            assert tokens_per_cycle(reply) > 1


def test_streams_of_an_interrupted_request_are_whole(two_at_a_time: Server, plain: Server) -> None:
    """What was streamed before an interruption is not sent again."""
    ids = prompt_of("prose")
    with ThreadPoolExecutor(3) as pool, streaming(two_at_a_time, ids, 300, ignore_eos=True) as chunks:
        seen = [next(chunks)]
        other = pool.submit(generate, two_at_a_time, prompt_of("prose", 1), 300, ignore_eos=True)
        body = {"input_ids": list(prompt_of("json")), "sampling_params": {"temperature": 0, "max_new_tokens": 64}}
        urgent = [pool.submit(two_at_a_time.post, "/generate", body | {"priority": 10}) for _ in range(2)]
        seen += chunks
        for one in (other, *urgent):
            one.result()
    lengths = [len(chunk["output_ids"]) for chunk in seen]
    assert lengths == sorted(lengths) and lengths[-1] == 300
    assert seen[-1]["output_ids"] == generate(plain, ids, 300, ignore_eos=True)["output_ids"]
