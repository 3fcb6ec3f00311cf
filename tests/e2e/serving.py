"""Requests in mid-stream, and what a server tells about its KV pool."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import requests

from benchmarks.common import pool as common_pool
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import Reply, generate, prompt_of

PATIENCE_SECONDS = 120.0


@contextmanager
def streaming(
    server: Server,
    ids: Sequence[int],
    max_new_tokens: int = 256,
    *,
    rid: str | None = None,
    require_reasoning: bool = False,
    **sampling: Any,
) -> Iterator[Iterator[Reply]]:
    """A streamed request. A chunk ends where a round ends; leaving the context early disconnects."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, **sampling}
    body = {"input_ids": list(ids), "sampling_params": sampling, "stream": True, "rid": rid}
    body["require_reasoning"] = require_reasoning
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as response:
        response.raise_for_status()
        yield (
            json.loads(line.removeprefix(b"data: ")) for line in response.iter_lines() if line.startswith(b"data: {")
        )


def gauge(server: Server, name: str) -> float:
    """One of SGLang's metrics, summed over its labels."""
    return common_pool.gauge(server.url, name)


def rounds_by_path(server: Server) -> dict[str, int]:
    """How many rounds ran on each path so far (`sglang_orthrus.metrics`)."""
    lines = server.get("/metrics").text.splitlines()
    found = (re.match(r'sglang_orthrus:rounds_total\{.*path="(\w+)".*\} (\S+)', line) for line in lines)
    return {match[1]: int(float(match[2])) for match in found if match}


def paths_since(server: Server, before: dict[str, int]) -> set[str]:
    """The paths that were taken since."""
    return {path for path, count in rounds_by_path(server).items() if count > before.get(path, 0)}


def wait_for_gauge(server: Server, name: str, value: float) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := gauge(server, name)) != value:
        assert server.is_running, server.log_tail()
        assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
        time.sleep(0.05)


def wait_until(is_reached: Callable[[], bool], running: Future[Any]) -> None:
    """Wait for a state that only holds while something runs; fail if that ends first, or after two minutes."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_reached():
        assert not running.done(), f"it ended before: {running.result()}"
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.01)


def free_slots(server: Server) -> int:
    """Slots of the KV pool that no request holds, once no request is left: the free ones and those of the radix tree.

    NOTE: flushing the cache resets the pool, so whatever leaked must be looked for before.
    """
    wait_for_gauge(server, "num_running_reqs", 0)
    wait_for_gauge(server, "num_queue_reqs", 0)
    wait_for_gauge(server, "kv_used_tokens", 0)
    return int(gauge(server, "kv_available_tokens") + gauge(server, "kv_evictable_tokens"))


def pool_size(server: Server) -> int:
    """Slots of the KV pool."""
    return int(common_pool.load(server.url)["max_total_num_tokens"])


def assert_nothing_leaked(server: Server) -> None:
    """The pool is whole, the scheduler lives, and a request after a flush finds all of it."""
    assert free_slots(server) == pool_size(server)
    server.get("/flush_cache?timeout=30")
    reply = generate(server, prompt_of("json"), 4)
    assert reply["meta_info"]["cached_tokens"] == 0
    assert len(reply["output_ids"]) == 4
    assert free_slots(server) == pool_size(server)
