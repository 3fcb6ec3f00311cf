"""Threads and time limits of the unit tests, and a process for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from sglang_orthrus.grammar import batch
from tests.unit.interpreted import switch_on


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """What these tests compute is small: two threads that wait for each other take ten times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def time_for_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, repairs of drafts could end earlier in one of two calls that a test compares."""
    monkeypatch.setattr(batch, "MIN_REPAIR_SECONDS", 600.0)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Executor]:
    """A process in which Triton's interpreter runs kernels (`tests.unit.interpreted`)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=switch_on) as process:
        yield process
