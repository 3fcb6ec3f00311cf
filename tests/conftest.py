"""Servers that the end-to-end tests share, and the rule for tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def orthrus() -> Iterator[Server]:
    """The bundled checkpoint served by ORTHRUS, overlap scheduling on. Shared: a test must leave it alive."""
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, "--decode-log-interval", "2", env=SETUP.env) as server:
        yield server


@pytest.fixture(scope="session")
def orthrus_without_overlap() -> Iterator[Server]:
    """The same with the synchronous scheduler."""
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, "--disable-overlap-schedule", env=SETUP.env) as server:
        yield server


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The truth: the AR-only export served by SGLang without the plugin."""
    exported: Path = export_ar(NANO, tmp_path_factory.mktemp("plain") / "nano-ar")
    with Server(exported, *TEST_ARGS, env={**plain_env(), **SETUP.env}) as server:
        yield server
