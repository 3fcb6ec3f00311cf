"""The CPU attention backend against a softmax written out row by row, over SGLang's own pool and layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_orthrus.cpu.attention import OrthrusCpuAttnBackend
from sglang_orthrus.cpu.kv_pool import CpuMHATokenToKVPool

Q_HEADS, KV_HEADS, DIM, LAYER = 4, 2, 128, 1
SLOTS = 700
PREFIXES = [5, 1, 130, 64]
WIDTH = 32


class World:
    """A pool whose every slot outside the given contexts is NaN, and a pass of `num_rows` new rows per request."""

    def __init__(self, prefixes: list[int], num_rows: list[int], seed: int = 0, backend: Any = OrthrusCpuAttnBackend):
        self.prefixes, self.num_rows = prefixes, num_rows
        g = torch.Generator().manual_seed(seed)
        pool = CpuMHATokenToKVPool(SLOTS, 1, torch.float32, KV_HEADS, DIM, LAYER + 1, "cpu", False)
        pool.get_key_buffer(LAYER).fill_(float("nan"))
        pool.get_value_buffer(LAYER).fill_(float("nan"))
        shuffled = torch.randperm(SLOTS, generator=g) + 1
        width = max(p + n for p, n in zip(prefixes, num_rows, strict=True)) + 3
        self.req_to_token = torch.randint(0, SLOTS, (9, width), generator=g, dtype=torch.int32)
        self.requests = torch.randperm(9, generator=g)[: len(prefixes)]
        self.contexts: list[torch.Tensor] = []
        new_slots = []
        for request, prefix, count in zip(self.requests.tolist(), prefixes, num_rows, strict=True):
            slots, shuffled = shuffled[: prefix + count], shuffled[prefix + count :]
            self.req_to_token[request, : prefix + count] = slots.int()
            for buffer in (pool.get_key_buffer(LAYER), pool.get_value_buffer(LAYER)):
                buffer[slots[:prefix]] = torch.randn(prefix, KV_HEADS, DIM, generator=g)
            self.contexts.append(slots)
            new_slots.append(slots[prefix:])
        rows = sum(num_rows)
        self.q = torch.randn(rows, Q_HEADS * DIM, generator=g)
        self.k = torch.randn(rows, KV_HEADS, DIM, generator=g)
        self.v = torch.randn(rows, KV_HEADS, DIM, generator=g)
        self.pool, self.out_cache_loc = pool, torch.cat(new_slots)
        self.backend = backend(
            SimpleNamespace(
                device="cpu",
                dtype=torch.float32,
                req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
                token_to_kv_pool=pool,
            )
        )

    def run(self, mode: ForwardMode, attn_type: AttentionType = AttentionType.DECODER, **layer: Any) -> torch.Tensor:
        prefixes, num_rows = torch.tensor(self.prefixes), torch.tensor(self.num_rows)
        batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=len(self.prefixes),
            input_ids=torch.zeros(len(self.q), dtype=torch.int64),
            req_pool_indices=self.requests,
            seq_lens=prefixes if mode.is_target_verify() else prefixes + num_rows,
            extend_prefix_lens=None if mode.is_target_verify() else prefixes,
            extend_seq_lens=None if mode.is_target_verify() else num_rows,
            out_cache_loc=self.out_cache_loc,
            encoder_lens=None,
        )
        radix = RadixAttention(Q_HEADS, DIM, DIM**-0.5, KV_HEADS, LAYER, attn_type=attn_type, **layer)
        self.backend.init_forward_metadata(batch)
        out: torch.Tensor = self.backend.forward(self.q, self.k, self.v, radix, batch)
        return out

    def reference(self, is_causal: bool) -> torch.Tensor:
        """Softmax in float64, one row and head at a time, from the pool after the pass."""
        keys, values = self.pool.get_key_buffer(LAYER).double(), self.pool.get_value_buffer(LAYER).double()
        queries = self.q.double().view(-1, Q_HEADS, DIM)
        rows: list[torch.Tensor] = []
        for slots, prefix, count in zip(self.contexts, self.prefixes, self.num_rows, strict=True):
            for j in range(count):
                seen = slots[: prefix + j + 1] if is_causal else slots
                query = queries[len(rows)]
                heads = []
                for head in range(Q_HEADS):
                    kv_head = head // (Q_HEADS // KV_HEADS)
                    weights = (keys[seen, kv_head] @ query[head] / DIM**0.5).softmax(0)
                    heads.append(weights @ values[seen, kv_head])
                rows.append(torch.cat(heads))
        return torch.stack(rows).float()


@pytest.mark.parametrize("attn_type", [AttentionType.DECODER, AttentionType.ENCODER_ONLY])
@pytest.mark.parametrize("seed", range(3))
def test_block_rows_see_the_prefix_and_their_share_of_the_block(attn_type: AttentionType, seed: int) -> None:
    world = World(PREFIXES, [WIDTH] * len(PREFIXES), seed)
    out = world.run(ForwardMode.TARGET_VERIFY, attn_type)
    torch.testing.assert_close(out, world.reference(attn_type == AttentionType.DECODER), rtol=1e-5, atol=1e-6)


def test_the_two_views_differ_in_all_rows_but_the_last() -> None:
    world = World([40], [WIDTH])
    causal = world.run(ForwardMode.TARGET_VERIFY)
    full = world.run(ForwardMode.TARGET_VERIFY, AttentionType.ENCODER_ONLY)
    differs = (causal - full).abs().amax(1) > 1e-3
    assert differs[:-1].all() and not differs[-1]


def test_a_narrower_block_than_the_one_before_is_planned_anew() -> None:
    wide = World(PREFIXES, [WIDTH] * len(PREFIXES))
    wide.run(ForwardMode.TARGET_VERIFY)
    narrow = World(PREFIXES, [3] * len(PREFIXES), seed=1)
    narrow.backend, wide.backend = wide.backend, narrow.backend
    narrow.backend.token_to_kv_pool, narrow.backend.req_to_token_pool = (
        wide.backend.token_to_kv_pool,
        wide.backend.req_to_token_pool,
    )
    torch.testing.assert_close(
        narrow.run(ForwardMode.TARGET_VERIFY), narrow.reference(is_causal=True), rtol=1e-5, atol=1e-6
    )


def test_a_block_does_not_depend_on_its_batch() -> None:
    together = World(PREFIXES, [WIDTH] * len(PREFIXES))
    expected = together.run(ForwardMode.TARGET_VERIFY)
    i = 2
    alone = World([PREFIXES[i]], [WIDTH])
    rows = slice(i * WIDTH, (i + 1) * WIDTH)
    alone.q, alone.k, alone.v = together.q[rows], together.k[rows], together.v[rows]
    for name in ("get_key_buffer", "get_value_buffer"):
        source, target = getattr(together.pool, name)(LAYER), getattr(alone.pool, name)(LAYER)
        target[alone.contexts[0]] = source[together.contexts[i]]
    assert torch.equal(alone.run(ForwardMode.TARGET_VERIFY), expected[rows])


def test_the_block_s_keys_and_values_are_left_in_its_slots() -> None:
    world = World(PREFIXES, [WIDTH] * len(PREFIXES))
    world.run(ForwardMode.TARGET_VERIFY)
    assert torch.equal(world.pool.get_key_buffer(LAYER)[world.out_cache_loc], world.k)
    assert torch.equal(world.pool.get_value_buffer(LAYER)[world.out_cache_loc], world.v)


def test_prefill_equals_torch_native() -> None:
    prefixes, num_rows = [0, 100, 64, 0], [50, 20, 16, 1]
    ours = World(prefixes, num_rows)
    stock = World(prefixes, num_rows, backend=TorchNativeAttnBackend)
    out = ours.run(ForwardMode.EXTEND)
    assert torch.equal(out, stock.run(ForwardMode.EXTEND))
    torch.testing.assert_close(out, ours.reference(is_causal=True), rtol=1e-5, atol=1e-6)


def test_prefill_of_a_few_rows_equals_torch_native_up_to_rounding() -> None:
    """The parent multiplies the prefix's rows too, and matrix products of one to four rows round differently."""
    prefixes, num_rows = [300, 7, 30], [1, 2, 3]
    ours = World(prefixes, num_rows)
    stock = World(prefixes, num_rows, backend=TorchNativeAttnBackend)
    torch.testing.assert_close(ours.run(ForwardMode.EXTEND), stock.run(ForwardMode.EXTEND), rtol=1e-5, atol=1e-6)


def test_decode_is_torch_native_s() -> None:
    ours = World([3, 90], [1, 1])
    stock = World([3, 90], [1, 1], backend=TorchNativeAttnBackend)
    out = ours.run(ForwardMode.DECODE)
    assert torch.equal(out, stock.run(ForwardMode.DECODE))
    torch.testing.assert_close(out, ours.reference(is_causal=True), rtol=1e-5, atol=1e-6)


def test_a_row_too_short_for_the_block_is_caught() -> None:
    world = World([40], [WIDTH])
    world.backend.req_to_token_pool.req_to_token = world.req_to_token[:, : 40 + WIDTH - 1]
    with pytest.raises(AssertionError):
        world.run(ForwardMode.TARGET_VERIFY)


def test_a_sliding_window_is_refused_for_blocks() -> None:
    with pytest.raises(NotImplementedError, match="sliding-window"):
        World([40], [WIDTH]).run(ForwardMode.TARGET_VERIFY, sliding_window_size=16)


def test_slots_move_without_triton() -> None:
    pool = CpuMHATokenToKVPool(8, 1, torch.float32, KV_HEADS, DIM, 1, "cpu", False, enable_kv_cache_copy=True)
    pool.get_key_buffer(0)[3], pool.get_value_buffer(0)[3] = 1.5, 2.5
    pool.move_kv_cache(torch.tensor([6]), torch.tensor([3]))
    assert (pool.get_key_buffer(0)[6] == 1.5).all() and (pool.get_value_buffer(0)[6] == 2.5).all()
