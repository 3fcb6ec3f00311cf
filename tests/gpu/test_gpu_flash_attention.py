"""FA3's kernel with one schedule for all layers of a pass, against the same kernel that makes its own in each."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_orthrus.passes.flash_attention import _schedule

pytestmark = pytest.mark.gpu

Q_HEADS, KV_HEADS, SIZE = 32, 8, 128
LAYERS, CONTEXT, SLOTS = 3, 40_960, 65_536
SHORT, LONG = 200, 9_000  # tokens of most contexts, and of one


class Pass:
    """Blocks of `width` rows behind random contexts, and the attention of a few layers."""

    def __init__(self, requests: int, width: int, page_size: int) -> None:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

        self._generator = torch.Generator("cuda").manual_seed(requests * width)
        self._attention = flash_attn_with_kvcache
        self._queries = [self._noise(requests * width, Q_HEADS, SIZE) for _ in range(LAYERS)]
        self._caches = [self._noise(SLOTS // page_size, page_size, KV_HEADS, SIZE) for _ in "kv"]
        pages = SLOTS // page_size
        table = torch.randint(pages, (requests, CONTEXT // page_size), generator=self._generator, device="cuda")
        self._metadata = SimpleNamespace(
            cache_seqlens_int32=torch.empty(requests, dtype=torch.int32, device="cuda"),
            max_seq_len_q=width,
            cu_seqlens_q=torch.arange(requests + 1, dtype=torch.int32, device="cuda") * width,
            cu_seqlens_k=torch.zeros(requests + 1, dtype=torch.int32, device="cuda"),
            page_table=table.int(),
        )
        self._backend = SimpleNamespace(
            forward_metadata=self._metadata,
            page_size=page_size,
            num_attention_heads=Q_HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=SIZE,
            kv_cache_dtype=torch.bfloat16,
            has_softcap=False,
            num_splits=0,
            _get_scheduler_metadata=get_scheduler_metadata,
        )
        self.change_contexts()

    def change_contexts(self) -> None:
        """To other lengths, one of them long, in the tensor that a graph has."""
        lens = self._metadata.cache_seqlens_int32
        new = self._metadata.max_seq_len_q + torch.randint(
            1, SHORT, lens.shape, generator=self._generator, device="cuda"
        )
        new[-1] += LONG
        lens.copy_(new)
        self._metadata.cu_seqlens_k[1:] = lens.cumsum(0)

    def run(self, is_causal: bool, *, at_once: bool) -> list[torch.Tensor]:
        """What every layer attends to. at_once: with one schedule."""
        metadata = self._metadata
        more = {"scheduler_metadata": _schedule(self._backend, is_causal)} if at_once else {}
        return [
            self._attention(
                q=q,
                k_cache=self._caches[0],
                v_cache=self._caches[1],
                page_table=metadata.page_table,
                cache_seqlens=metadata.cache_seqlens_int32,
                cu_seqlens_q=metadata.cu_seqlens_q,
                cu_seqlens_k_new=metadata.cu_seqlens_k,
                max_seqlen_q=metadata.max_seq_len_q,
                softmax_scale=SIZE**-0.5,
                causal=is_causal,
                num_splits=self._backend.num_splits,
                **more,
            )
            for q in self._queries
        ]

    def _noise(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=self._generator, device="cuda").bfloat16()


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FA3 is SGLang's default on Hopper")


def _captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("width", [1, 8, 16, 32])
@pytest.mark.parametrize("requests", [1, 3, 8, 64, 128, 1000])
def test_no_bit_differs(requests: int, width: int, page_size: int) -> None:
    blocks = Pass(requests, width, page_size)
    for is_causal in (True, False):
        expected = blocks.run(is_causal, at_once=False)
        for layer, (theirs, ours) in enumerate(zip(expected, blocks.run(is_causal, at_once=True), strict=True)):
            assert torch.equal(theirs, ours), (is_causal, layer)


@pytest.mark.parametrize("width", [1, 32])
@pytest.mark.parametrize("requests", [1, 5, 32])
def test_a_replay_makes_the_schedule_anew(requests: int, width: int) -> None:
    """A round's two passes in one graph, with contexts of other lengths at every replay."""
    blocks = Pass(requests, width, 1)

    def both(at_once: bool) -> list[torch.Tensor]:
        return [*blocks.run(False, at_once=at_once), *blocks.run(True, at_once=at_once)]

    both(at_once=True)
    graph, found = _captured(lambda: both(at_once=True))
    for _ in range(3):
        blocks.change_contexts()
        graph.replay()
        assert all(map(torch.equal, found, both(at_once=False)))
