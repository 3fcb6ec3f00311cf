"""A time limit of the unit tests, and a process for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from sglang_orthrus.grammar import batch
from tests.unit.interpreted import switch_on


@pytest.fixture(autouse=True)
def time_for_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, repairs of drafts could end earlier in one of two calls that a test compares."""
    monkeypatch.setattr(batch, "MIN_REPAIR_SECONDS", 600.0)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Executor]:
    """A process in which Triton's interpreter runs kernels (`tests.unit.interpreted`)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=switch_on) as process:
        yield process
