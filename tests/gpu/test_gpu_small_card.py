"""A card of 24 GB at SGLang's default settings: the costliest requests, as many as may run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_orthrus.cli.demo import ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.fixtures import write_released_shaped

pytestmark = pytest.mark.gpu

CARD = 24 * 2**30
# What SGLang chooses for such a card of 24,564 MiB by itself: it keeps 512 and 128 MB, 1.5 MB for each of 4,096 tokens
# of prefill, 2 MB for each of 48 requests' graphs, 8 MB for each of 50 prefill graphs; 1,664 MB to size after capture.
FRACTIONS = {"default": "0.704", "post-capture sizing": "0.932"}
DEFAULTS = (
    *("--chunked-prefill-size", "4096", "--cuda-graph-max-bs-decode", "48", "--max-running-requests", "48"),
    *("--attention-backend", "flashinfer", "--context-length", "4096"),
)
REQUESTS = 48


@pytest.fixture
def small_card() -> Iterator[None]:
    """Take what is more than such a card has."""
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free - CARD), dtype=torch.uint8, device="cuda")
    yield
    del taken
    torch.cuda.empty_cache()


@pytest.mark.parametrize("sizing", FRACTIONS)
def test_the_costliest_requests_are_served(sizing: str, small_card: None, tmp_path: Path) -> None:
    """The whole vocabulary, two layers: what is not the KV pool's is as large as in the whole model, or larger."""
    model = write_released_shaped(tmp_path / "checkpoint", "1.7B")
    env = {} if sizing == "default" else {"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1"}
    flags = (*ORTHRUS_ARGS, "--load-format", "dummy", "--dtype", "bfloat16", "--mem-fraction-static", FRACTIONS[sizing])
    with Server(model, *flags, *DEFAULTS, env=env) as server:

        def ask(number: int) -> Any:
            sampling: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 24, "ignore_eos": True}
            if number % 2:
                sampling |= {"frequency_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {"5": -1.0}}
            if number % 3 == 0:
                sampling |= {"temperature": 0.0}
            wanted = {"return_logprob": True, "top_logprobs_num": 20} if number % 4 else {}
            return server.post("/generate", {"text": "Hello " * 40, "sampling_params": sampling, **wanted})

        with ThreadPoolExecutor(REQUESTS) as pool:
            replies = list(pool.map(ask, range(2 * REQUESTS)))
        free, _ = torch.cuda.mem_get_info()
        print(f"free in the end: {free / 2**30:.2f} GB")
        log = server.log_path.read_text()
    assert all(len(reply["output_ids"]) == 24 for reply in replies)
    assert "ORTHRUS chooses tokens in at most" in log
