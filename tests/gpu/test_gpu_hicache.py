"""The hierarchical cache on FlashInfer and FA3 in bf16: KV goes to the host and comes back, also beside rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.common.reference import Reference
from benchmarks.common.setups import BF16_NEAR_TIE, ONE_WIDTH
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.e2e.load_backs import CHECKS, HICACHE
from tests.servers import MEMORY_CHECKS, OPTIMISTIC

pytestmark = pytest.mark.gpu

COMMON = (*HICACHE, "--dtype", "bfloat16", "--mem-fraction-static", "0.4", "--cuda-graph-max-bs-decode", "4")
# With FlashInfer SGLang's defaults, but for prefill graphs. With FA3 all else, and prefills of a page replay graphs.
BACKENDS = {
    "flashinfer": ("--hicache-ratio", "4", "--cuda-graph-backend-prefill", "disabled"),
    "fa3": (
        *("--hicache-size", "1", "--hicache-write-policy", "write_back", "--hicache-io-backend", "direct"),
        *("--hicache-mem-layout", "page_first_direct", "--page-size", "16", "--cuda-graph-bs-prefill", "16"),
    ),
}
# Each layer's KV comes some 5 ms late, so that a pass that does not wait for it reads what was there before.
LATE = {"SGLANG_TEST_HICACHE_H2D_DELAY_CYCLES": "10000000"}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    """Both, started at once."""
    env = {**ONE_WIDTH, **MEMORY_CHECKS, **OPTIMISTIC, **LATE}
    found = {
        name: Server(NANO, *ORTHRUS_ARGS, *COMMON, "--attention-backend", name, *own, env=env, timeout=400)
        for name, own in BACKENDS.items()
    }
    # The kernel ends a server with the thread that started it.
    with ThreadPoolExecutor(len(found)) as threads:
        try:
            list(threads.map(Server.start, found.values()))
            yield found
        finally:
            for server in found.values():
                server.stop()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_after_a_load_back(
    servers: dict[str, Server],
    reference: Reference,
    backend: str,
    check: Callable[[Server, Reference, float], None],
) -> None:
    check(servers[backend], reference, BF16_NEAR_TIE)
    passes = (line for line in servers[backend].get("/metrics").text.splitlines() if "cuda_graph_passes_total{" in line)
    print("\n".join(passes))
