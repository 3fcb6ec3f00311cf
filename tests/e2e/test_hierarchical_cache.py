"""The hierarchical cache on a CPU: its transfers are PyTorch's there, all else is as on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
import pytest
import torch

from benchmarks.common.equality import NEAR_TIE
from benchmarks.common.reference import Reference
from benchmarks.common.setups import ONE_WIDTH
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.e2e.load_backs import CHECKS, HICACHE
from tests.servers import CORE_FOR_EACH_RANK, MEMORY_CHECKS, OPTIMISTIC, PAGE

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_gpu_hicache.py has these checks for a GPU"),
    # SGLang leaves 10 GiB to others.
    pytest.mark.skipif(psutil.virtual_memory().available < 13 * 2**30, reason="needs 13 GiB of free memory"),
]

SETS = {
    "write through": ("--hicache-ratio", "4"),
    "selective": ("--hicache-write-policy", "write_through_selective", "--hicache-ratio", "4"),
    "write back, pages, two ranks": (
        *("--hicache-write-policy", "write_back", "--hicache-mem-layout", "layer_first", "--hicache-ratio", "3"),
        *("--page-size", str(PAGE), "--chunked-prefill-size", "128", "--tp-size", "2", "--disable-overlap-schedule"),
    ),
}


@pytest.fixture(scope="module", params=SETS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    args = (*ORTHRUS_ARGS, "--dtype", "float32", *HICACHE, *SETS[request.param])
    env = {**ONE_WIDTH, **MEMORY_CHECKS, **OPTIMISTIC, **CORE_FOR_EACH_RANK}
    with Server(NANO, *args, env=env, timeout=600) as running:
        yield running


@pytest.mark.parametrize("check", CHECKS)
def test_after_a_load_back(
    server: Server, reference: Reference, check: Callable[[Server, Reference, float], None]
) -> None:
    check(server, reference, NEAR_TIE)
