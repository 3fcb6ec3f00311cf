"""Threads of the unit tests, and a process for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from tests.unit.interpreted import switch_on


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """What these tests compute is small: two threads that wait for each other take ten times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Executor]:
    """A process in which Triton's interpreter runs kernels (`tests.unit.interpreted`)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=switch_on) as process:
        yield process
