"""Servers that the end-to-end tests share, and the rule for tests that need a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks.common.reference import Reference
from benchmarks.common.setups import SETUPS
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS, SERVER_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar

CONTEXT_LENGTH = 2048
# fp32 on either device, so that outputs can be compared token by token.
SETUP = SETUPS["triton-fp32" if torch.cuda.is_available() else "cpu"]
TEST_ARGS = (
    *(*SERVER_ARGS, *SETUP.args, "--context-length", str(CONTEXT_LENGTH)),
    *("--enable-metrics", "--enable-custom-logit-processor"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The bundled checkpoint in plain PyTorch."""
    return Reference(NANO)


@dataclass(frozen=True)
class Launch:
    """How to start one of the shared servers."""

    model: Path
    args: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def start(self) -> Server:
        server = Server(self.model, *self.args, env={**SETUP.env, **self.env})
        server.start()
        return server


class Servers:
    """Shared servers by the names of their fixtures; those that the collected tests need start together.

    NOTE: the kernel ends a server with the thread that started it, so the threads stay until the servers have stopped.
    """

    def __init__(self, launches: Mapping[str, Launch], needed: Collection[str]) -> None:
        self._launches = launches
        self._threads = ThreadPoolExecutor(len(launches))
        self._started = {
            name: self._threads.submit(launch.start) for name, launch in launches.items() if name in needed
        }

    def __getitem__(self, name: str) -> Server:
        if name not in self._started:
            self._started[name] = self._threads.submit(self._launches[name].start)
        return self._started[name].result()

    def stop(self) -> None:
        for started in self._started.values():
            if started.exception() is None:
                started.result().stop()
        self._threads.shutdown()


def names_used_by(items: Iterable[pytest.Item]) -> set[str]:
    """Fixtures of these tests, those included that a parameter names."""
    names: set[str] = set()
    for item in items:
        names.update(getattr(item, "fixturenames", ()))
        callspec = getattr(item, "callspec", None)
        names.update(value for value in (callspec.params.values() if callspec else ()) if isinstance(value, str))
    return names


@pytest.fixture(scope="session")
def shared_servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    ours = (*ORTHRUS_ARGS, *TEST_ARGS)
    exported = export_ar(NANO, tmp_path_factory.mktemp("plain") / "nano-ar")
    launches = {
        "orthrus": Launch(NANO, (*ours, "--decode-log-interval", "2")),
        "orthrus_without_overlap": Launch(NANO, (*ours, "--disable-overlap-schedule")),
        "plain": Launch(exported, TEST_ARGS, plain_env()),
    }
    running = Servers(launches, names_used_by(request.session.items))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def orthrus(shared_servers: Servers) -> Server:
    """The bundled checkpoint served by ORTHRUS, overlap scheduling on. Shared: a test must leave it alive."""
    return shared_servers["orthrus"]


@pytest.fixture(scope="session")
def orthrus_without_overlap(shared_servers: Servers) -> Server:
    """The same with the synchronous scheduler."""
    return shared_servers["orthrus_without_overlap"]


@pytest.fixture(scope="session")
def plain(shared_servers: Servers) -> Server:
    """The truth: the AR-only export served by SGLang without the plugin."""
    return shared_servers["plain"]
