"""What happens to requests that are retracted, aborted, abandoned or late, and to the KV pool afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.conftest import TEST_ARGS
from tests.e2e.helpers import assert_same_output, generate, prompt_of, tokens_per_cycle
from tests.e2e.serving import GAUGES, STRICT, assert_nothing_leaked, gauge, streaming, wait_for_gauge, wait_until

pytestmark = pytest.mark.e2e

POOL_ARGS = ("--max-total-tokens", "1024", *GAUGES)
# Requests are admitted as if they would write 16 tokens, so that the pool fills up while they run.
OPTIMISTIC = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
OVERLAP = {"overlap": (), "no-overlap": ("--disable-overlap-schedule", "--page-size", "16")}
HASTE = {"SGLANG_REQ_WAITING_TIMEOUT": "1", "SGLANG_REQ_RUNNING_TIMEOUT": "4"}
LONG = 700
LONGER = 1900  # more than any machine writes before the timeout


@pytest.fixture(scope="module", params=["overlap", pytest.param("no-overlap", marks=pytest.mark.slow)])
def tiny(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A pool for a handful of requests, checked after every step."""
    with Server(
        NANO, *ORTHRUS_ARGS, *TEST_ARGS, *POOL_ARGS, *OVERLAP[request.param], env=STRICT | OPTIMISTIC
    ) as server:
        yield server


@pytest.fixture(scope="module")
def hasty() -> Iterator[Server]:
    """One request at a time, and not for long."""
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *GAUGES, "--max-running-requests", "1", env=STRICT | HASTE) as server:
        yield server


def test_retracted_requests_complete(tiny: Server, plain: Server, reference: Reference) -> None:
    names = [("convert", 0), ("convert", 1), ("prose", 0), ("prose", 1), ("arith", 0), ("arith", 2), ("prose", 2)]
    ids = [prompt_of(*name) for name in names]
    sampling = {"temperature": 0, "max_new_tokens": 160}
    before = gauge(tiny, "num_retracted_requests_total")
    replies, expected = (
        server.post("/generate", {"input_ids": [list(each) for each in ids], "sampling_params": sampling})
        for server in (tiny, plain)
    )
    assert gauge(tiny, "num_retracted_requests_total") > before
    assert "KV cache pool is full. Retract requests" in tiny.log_path.read_text()
    for each, truth, reply in zip(ids, expected, replies, strict=True):
        assert_same_output(reference, each, truth, reply)
        assert tokens_per_cycle(reply) > 2
    assert_nothing_leaked(tiny)


def test_an_abort_in_mid_stream_ends_one_request(tiny: Server, plain: Server, reference: Reference) -> None:
    ids, other = prompt_of("prose"), prompt_of("prose", 1)
    with ThreadPoolExecutor() as pool, streaming(tiny, ids, LONG, rid="doomed", ignore_eos=True) as chunks:
        next(chunks)
        neighbour = pool.submit(generate, tiny, other, 100)
        next(chunks)
        requests.post(f"{tiny.url}/abort_request", json={"rid": "doomed"}, timeout=60).raise_for_status()
        last = list(chunks)[-1]
        assert_same_output(reference, other, generate(plain, other, 100), neighbour.result())
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(last["output_ids"]) < LONG
    truth = generate(plain, ids, 100)
    assert last["output_ids"][:100] == truth["output_ids"][: len(last["output_ids"])]
    assert_nothing_leaked(tiny)


def test_abort_all_ends_running_and_waiting_requests(tiny: Server) -> None:
    """Eight of them: not all fit."""
    body = {
        "input_ids": [list(prompt_of("prose", number % 4)) for number in range(8)],
        "sampling_params": {"temperature": 0, "max_new_tokens": LONG, "ignore_eos": True},
    }
    with ThreadPoolExecutor() as pool:
        replies = pool.submit(tiny.post, "/generate", body)
        wait_until(lambda: bool(gauge(tiny, "num_running_reqs") and gauge(tiny, "num_queue_reqs")), replies)
        requests.post(f"{tiny.url}/abort_request", json={"abort_all": True}, timeout=60).raise_for_status()
        for reply in replies.result():
            assert reply["meta_info"]["finish_reason"]["type"] == "abort"
    assert_nothing_leaked(tiny)


def test_a_client_that_disconnects_frees_its_slots(tiny: Server, plain: Server, reference: Reference) -> None:
    other = prompt_of("prose", 1)
    with ThreadPoolExecutor() as pool:
        with streaming(tiny, prompt_of("prose"), LONG, ignore_eos=True) as chunks:
            next(chunks)
            neighbour = pool.submit(generate, tiny, other, 100)
            next(chunks)
            wait_for_gauge(tiny, "num_running_reqs", 2)
        assert_same_output(reference, other, generate(plain, other, 100), neighbour.result())
    assert_nothing_leaked(tiny)


@pytest.mark.slow
def test_timeouts_end_requests_that_run_and_that_wait(hasty: Server, plain: Server) -> None:
    ids = prompt_of("prose")
    with ThreadPoolExecutor() as pool, streaming(hasty, ids, LONGER, ignore_eos=True) as chunks:
        next(chunks)
        waiting = pool.submit(generate, hasty, prompt_of("chat"))
        *delivered, end = chunks
        with pytest.raises(requests.HTTPError) as refusal:
            waiting.result()
    assert refusal.value.response.status_code == 503
    assert "waiting timeout" in refusal.value.response.text
    assert "running timeout" in str(end)
    tokens = delivered[-1]["output_ids"]
    assert tokens[:100] == generate(plain, ids, 100)["output_ids"][: len(tokens)]
    assert_nothing_leaked(hasty)
