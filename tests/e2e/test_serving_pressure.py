"""What happens to requests that are retracted, aborted, abandoned or late, and to the KV pool afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import assert_same_output, both, generate, prompt_of, tokens_per_cycle, truth
from tests.e2e.serving import assert_nothing_leaked, gauge, streaming, wait_for_gauge, wait_until
from tests.servers import GAUGES, MEMORY_CHECKS, OPTIMISTIC, PAGE, SETUP, SMALL_POOL, TEST_ARGS, WITHOUT_OVERLAP

pytestmark = pytest.mark.e2e

HASTE = {"SGLANG_REQ_WAITING_TIMEOUT": "1", "SGLANG_REQ_RUNNING_TIMEOUT": "4"}
LONG = 700
LONGER = 1900  # more than any machine writes before the timeout


@pytest.fixture(scope="module")
def small_without_overlap() -> Iterator[Server]:
    """A small pool, checked after every step, under the synchronous scheduler; rounds are eager."""
    pool = ("--max-total-tokens", str(SMALL_POOL), "--page-size", str(PAGE), *GAUGES)
    env = {**SETUP.env, **MEMORY_CHECKS, **OPTIMISTIC}
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *pool, WITHOUT_OVERLAP, env=env) as server:
        yield server


@pytest.fixture(params=["small", pytest.param("small_without_overlap", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest) -> Server:
    """A pool that fills up while requests run."""
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def hasty() -> Iterator[Server]:
    """One request at a time, and not for long."""
    args = (*ORTHRUS_ARGS, *TEST_ARGS, *GAUGES, "--max-running-requests", "1")
    with Server(NANO, *args, env={**SETUP.env, **MEMORY_CHECKS, **HASTE}) as server:
        yield server


def test_retracted_requests_complete(server: Server, plain: Server, reference: Reference) -> None:
    ids = [prompt_of(family, number) for family in ("convert", "prose", "arith", "code") for number in range(4)]
    sampling = {"temperature": 0, "max_new_tokens": 160}
    before = gauge(server, "num_retracted_requests_total")
    body = {"input_ids": [list(each) for each in ids], "sampling_params": sampling}
    replies, expected = both(Server.post, (server, plain), "/generate", body)
    assert gauge(server, "num_retracted_requests_total") > before
    assert "KV cache pool is full. Retract requests" in server.log_path.read_text()
    for each, wanted, reply in zip(ids, expected, replies, strict=True):
        assert_same_output(reference, each, wanted, reply)
        assert tokens_per_cycle(reply) > 2
    assert_nothing_leaked(server)


def test_an_abort_in_mid_stream_ends_one_request(server: Server, plain: Server, reference: Reference) -> None:
    ids, other = prompt_of("prose"), prompt_of("prose", 1)
    with ThreadPoolExecutor() as pool, streaming(server, ids, LONG, rid="doomed", ignore_eos=True) as chunks:
        next(chunks)
        neighbour = pool.submit(generate, server, other, 100)
        next(chunks)
        requests.post(f"{server.url}/abort_request", json={"rid": "doomed"}, timeout=60).raise_for_status()
        last = list(chunks)[-1]
        assert_same_output(reference, other, truth(plain, other, 100), neighbour.result())
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(last["output_ids"]) < LONG
    whole = generate(plain, ids, 100)
    assert last["output_ids"][:100] == whole["output_ids"][: len(last["output_ids"])]
    assert_nothing_leaked(server)


def test_abort_all_ends_running_and_waiting_requests(server: Server) -> None:
    """So many of them that not all fit."""
    body = {
        "input_ids": [list(prompt_of("prose", number % 4)) for number in range(24)],
        "sampling_params": {"temperature": 0, "max_new_tokens": LONG, "ignore_eos": True},
    }
    with ThreadPoolExecutor() as pool:
        replies = pool.submit(server.post, "/generate", body)
        wait_until(lambda: bool(gauge(server, "num_running_reqs") and gauge(server, "num_queue_reqs")), replies)
        requests.post(f"{server.url}/abort_request", json={"abort_all": True}, timeout=60).raise_for_status()
        for reply in replies.result():
            assert reply["meta_info"]["finish_reason"]["type"] == "abort"
    assert_nothing_leaked(server)


def test_a_client_that_disconnects_frees_its_slots(server: Server, plain: Server, reference: Reference) -> None:
    other = prompt_of("prose", 1)
    with ThreadPoolExecutor() as pool:
        with streaming(server, prompt_of("prose"), LONG, ignore_eos=True) as chunks:
            next(chunks)
            neighbour = pool.submit(generate, server, other, 100)
            next(chunks)
            wait_for_gauge(server, "num_running_reqs", 2)
        assert_same_output(reference, other, truth(plain, other, 100), neighbour.result())
    assert_nothing_leaked(server)


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
