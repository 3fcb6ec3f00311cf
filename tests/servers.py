"""The servers that the end-to-end tests share. Each combines settings that do not get into each other's way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.plugins import with_plugins
from benchmarks.common.setups import SETUPS
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS, SERVER_ARGS
from sglang_orthrus.cli.server import Server, free_port, plain_env
from sglang_orthrus.config import SLOW_MASK_MS
from sglang_orthrus.models.checkpoint import export_ar

ROOT = Path(__file__).resolve().parents[1]
CONTEXT_LENGTH = 2048
# fp32 on either device, so that outputs can be compared token by token.
SETUP = SETUPS["triton-fp32" if torch.cuda.is_available() else "cpu"]
TEST_ARGS = (
    *(*SERVER_ARGS, *SETUP.args, "--context-length", str(CONTEXT_LENGTH)),
    *("--enable-metrics", "--enable-custom-logit-processor"),
)
WITHOUT_OVERLAP = "--disable-overlap-schedule"
LLGUIDANCE = ("--grammar-backend", "llguidance")
REASONING = ("--reasoning-parser", "qwen3")
NO_WHITE_SPACE = "--constrained-json-disable-any-whitespace"
# Gauges are written after every step, and therefore also when the last request has left.
GAUGES = ("--decode-log-interval", "1")
# The scheduler asserts the accounting of the pool after every step, and that no slot has two owners.
MEMORY_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
}
# Requests are admitted as if they would write 16 tokens, so that a small pool fills up while they run.
OPTIMISTIC = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}

PAGE = 16
SMALL_POOL = 2304  # tokens: a request of the context length, and little more
# SGLang's kits ask for temperature 0.5 and say nothing of top_k; with 1 as its default they are greedy.
KIT_ARGS = ("--preferred-sampling-params", '{"top_k": 1}', "--allow-auto-truncate")
SMALL_ARGS = (
    *("--page-size", str(PAGE), "--chunked-prefill-size", "16", "--max-total-tokens", str(SMALL_POOL), *GAUGES),
    *(*REASONING, NO_WHITE_SPACE, *KIT_ARGS),
)
NARROW_WIDTH = 8
# A GPU machine would need two GPUs.
TWO_RANKS = () if torch.cuda.is_available() else ("--tp-size", "2")
CORE_FOR_EACH_RANK = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
NARROW_ARGS = (
    *("--speculative-num-draft-tokens", str(NARROW_WIDTH), *LLGUIDANCE, *TWO_RANKS),
    *("--enable-deterministic-inference", WITHOUT_OVERLAP),
)


@dataclass(frozen=True)
class Launch:
    """How to start a server."""

    model: Path
    args: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def server(self, port: int, rendezvous: int) -> Server:
        """The server, not started, on these ports."""
        args = (*self.args, "--nccl-port", str(rendezvous))
        # All of them start at once, on as few as two cores.
        return Server(self.model, *args, port=port, env={**SETUP.env, **self.env}, timeout=600)


def launches(folder: Path) -> dict[str, Launch]:
    """Shared servers by the names of their fixtures (`tests/conftest.py` says what each is for).

    Args:
        folder: where their checkpoints are written.
    """
    ours = (*ORTHRUS_ARGS, *TEST_ARGS)
    thinker = thinking_by_default(Path(shutil.copytree(NANO, folder / "thinker")))
    forked = plugins_on_cpu(folder / "forked", "forked")
    small_env = MEMORY_CHECKS | OPTIMISTIC | {SLOW_MASK_MS: "0"}
    small_env |= plugins_on_cpu(folder / "small", "forked", "graph_replay")
    return {
        "orthrus": Launch(NANO, (*ours, "--decode-log-interval", "2")),
        "plain": Launch(export_ar(NANO, folder / "nano-ar"), TEST_ARGS, plain_env()),
        "small": Launch(thinker, (*ours, *SMALL_ARGS), small_env),
        "narrow": Launch(NANO, (*ours, *NARROW_ARGS), forked | CORE_FOR_EACH_RANK),
    }


def thinking_by_default(folder: Path) -> Path:
    """Let a copy of nano think unless asked not to, as SGLang's kits expect of Qwen3."""
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("set enable_thinking = false", "set enable_thinking = true"), encoding="utf-8")
    assert template.read_text(encoding="utf-8") != text
    return folder


def change(path: Path, **changes: Any) -> None:
    """Change some values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def replayed_graphs(folder: Path) -> dict[str, str]:
    """Environment in which captured functions stand in for CUDA graphs (`tests.e2e.graph_replay`).

    Empty on a GPU, which has graphs of its own.
    """
    return plugins_on_cpu(folder, "graph_replay")


def plugins_on_cpu(folder: Path, *names: str) -> dict[str, str]:
    """Environment in which SGLang finds these plugins of `tests.e2e`; empty on a GPU."""
    return {} if torch.cuda.is_available() else with_plugins(folder, {name: f"tests.e2e.{name}" for name in names})


class Servers:
    """Shared servers by name; those that the collected tests need start together.

    NOTE: the kernel ends a server with the thread that started it, so the threads stay until the servers have stopped.
    """

    def __init__(self, launches: Mapping[str, Launch], needed: Collection[str]) -> None:
        self._launches = launches
        self._threads = ThreadPoolExecutor(len(launches))
        self._ports = free_ports(2 * len(launches))
        self._started: dict[str, Future[Server]] = {}
        for name in launches:
            if name in needed:
                self._start(name)

    def __getitem__(self, name: str) -> Server:
        if name not in self._started:
            self._start(name)
        return self._started[name].result()

    def stop(self) -> None:
        """Stop all of them."""
        for started in self._started.values():
            if started.exception() is None:
                started.result().stop()
        self._threads.shutdown()

    def _start(self, name: str) -> None:
        # Here, as it copies the environment, which tests change.
        server = self._launches[name].server(self._ports.pop(), self._ports.pop())

        def start() -> Server:
            server.start()
            return server

        self._started[name] = self._threads.submit(start)


def free_ports(count: int) -> set[int]:
    """Different ones, as servers that start at once bind theirs only seconds later."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return ports


def names_used_by(items: Iterable[pytest.Item]) -> set[str]:
    """Fixtures of these tests, those included that a parameter names."""
    names: set[str] = set()
    for item in items:
        names.update(getattr(item, "fixturenames", ()))
        callspec = getattr(item, "callspec", None)
        names.update(value for value in (callspec.params.values() if callspec else ()) if isinstance(value, str))
    return names
