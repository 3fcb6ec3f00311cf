"""Two servers behind SGLang's router. `make clients` installs it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, free_port
from tests.e2e.helpers import assert_same_output, generate, prompt_of, prompts, tokens_per_cycle, truth
from tests.e2e.serving import PATIENCE_SECONDS, assert_nothing_leaked, gauge
from tests.e2e.test_clients import python_of
from tests.servers import GAUGES, SETUP, TEST_ARGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LONG = 400


@dataclass
class Router:
    """The router, and the servers behind it."""

    url: str
    servers: list[Server]

    def ask(self, ids: tuple[int, ...], max_new_tokens: int, **sampling: Any) -> requests.Response:
        """A greedy request."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, **sampling}
        body = {"input_ids": list(ids), "sampling_params": sampling}
        return requests.post(f"{self.url}/generate", json=body, timeout=300)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    python = python_of("router")
    args = (*ORTHRUS_ARGS, *TEST_ARGS, *GAUGES)
    log = tmp_path_factory.mktemp("router") / "log"
    with (
        Server(NANO, *args, env=SETUP.env, timeout=600) as first,
        Server(NANO, *args, env=SETUP.env, timeout=600) as second,
        routed(python, [first, second], log) as found,
    ):
        yield found


class routed:
    """Runs the router in front of some servers."""

    def __init__(self, python: Path, servers: list[Server], log: Path) -> None:
        port, prometheus = free_port(), free_port()
        self._router = Router(f"http://127.0.0.1:{port}", servers)
        self._log = log
        self._command = [
            *(str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-port", str(prometheus), "--policy", "cache_aware"),
            *("--worker-urls", *(server.url for server in servers)),
        ]

    def __enter__(self) -> Router:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            try:
                if self._router.ask(prompt_of("json"), 1).ok:
                    return self._router
            except requests.ConnectionError:
                pass
            time.sleep(0.5)
        raise AssertionError(self._log.read_text()[-2000:])

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


def test_answers_are_those_of_one_server(router: Router, plain: Server, reference: Reference) -> None:
    some = prompts()[::5]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda prompt: router.ask(prompt.ids, 64), some))
    for prompt, reply in zip(some, replies, strict=True):
        assert_same_output(reference, prompt.ids, truth(plain, prompt.ids, 64), reply.json())
    assert sum(tokens_per_cycle(reply.json()) for reply in replies) / len(replies) > 4


def test_a_prefix_goes_where_it_is_cached(router: Router) -> None:
    """Whichever server had it first."""
    prefix = tuple(token for number in range(4) for token in prompt_of("prose", number))
    for family in ("arith", "code", "chat"):
        last = router.ask((*prefix, *prompt_of(family)), 8).json()
    assert last["meta_info"]["cached_tokens"] >= len(prefix) - 1


def test_a_server_that_dies_takes_no_other_requests_with_it(router: Router, plain: Server) -> None:
    """The router sends what the dead one had to the other one."""
    dead, alive = router.servers
    families = ("prose", "code", "json", "chat", "qa", "think", "arith", "convert")
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(router.ask, prompt_of(family), LONG, ignore_eos=True) for family in families]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while min(gauge(server, "num_running_reqs") for server in router.servers) < 1:
            assert time.monotonic() < deadline and not all(one.done() for one in pending)
            time.sleep(0.05)
        os.killpg(dead._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        replies = [one.result() for one in pending]
    for family, reply in zip(families, replies, strict=True):
        assert reply.status_code == 200, (family, reply.status_code, reply.text[:200])
        expected = generate(plain, prompt_of(family), LONG, ignore_eos=True)
        assert reply.json()["output_ids"] == expected["output_ids"], family
    assert_nothing_leaked(alive)
    assert router.ask(prompt_of("json"), 32).ok
