"""Fixtures of the servers that the end-to-end tests share, and the rule for tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.common.browser import NoBrowserError, chromium
from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.server import Server
from tests.servers import Servers, launches, names_used_by


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


@pytest.fixture(scope="session")
def shared_servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """All of the following. A test must leave them alive and as they were."""
    running = Servers(launches(tmp_path_factory.mktemp("servers")), names_used_by(request.session.items))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def orthrus(shared_servers: Servers) -> Server:
    """The bundled checkpoint served by ORTHRUS with SGLang's defaults: overlap scheduling, pages of one token."""
    return shared_servers["orthrus"]


@pytest.fixture(scope="session")
def plain(shared_servers: Servers) -> Server:
    """The truth: the AR-only export served by SGLang without the plugin."""
    return shared_servers["plain"]


@pytest.fixture(scope="session")
def small(shared_servers: Servers) -> Server:
    """ORTHRUS where all is tight: a small pool that is checked after every step, pages, prefill chunks of half a block.

    Rounds of up to four requests are (the stand-in's) CUDA graphs. A reasoning parser, a template that thinks by
    default, JSON without white space, no time for masks. Requests that do not give `top_k` are greedy.
    """
    return shared_servers["small"]


@pytest.fixture(scope="session")
def narrow(shared_servers: Servers) -> Server:
    """ORTHRUS with all else that is not the default, and does not need `small`.

    The synchronous scheduler, two ranks on a CPU, blocks narrower than the trained ones, llguidance, seeds that count.
    """
    return shared_servers["narrow"]


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """A browser for tests of the page; a machine without one skips them, and says what is missing."""
    try:
        return chromium()
    except NoBrowserError as error:
        pytest.skip(str(error))
