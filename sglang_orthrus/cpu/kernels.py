"""PyTorch versions of SGLang's Triton kernels that have no CPU path of their own.

Same signatures and same results, bit by bit, as the functions they replace (`sglang_orthrus.cpu.replacements`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from sglang_orthrus.compat.ledger import depends_on

logger = logging.getLogger(__name__)


@depends_on(
    "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func",
    "req_pool_indices",
    "req_to_token",
    "start_offset",
    "end_offset",
    "out_cache_loc",
    "batch_size",
    what="replaced by PyTorch indexing",
    why="it launches Triton unless SGLANG_USE_CPU_ENGINE=1, which needs kernels that the wheel lacks",
    until="it asks the platform's supports_triton, as the paged allocator does",
)
def assign_req_to_token_pool_func(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write newly allocated slots into the requests' rows (`sglang.srt.mem_cache.allocation`).

    Args:
        req_pool_indices: [bs] rows of `req_to_token`.
        req_to_token: [requests, columns] int32, written in place.
        start_offset: [bs] first column to write, per request.
        end_offset: [bs] one past the last column; not above start_offset means nothing to write.
        out_cache_loc: [sum of (end - start)] slots, request after request.
        batch_size: bs.
    """
    taken = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in rows:
        if end > start:
            req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start]
        taken += end - start


@depends_on(
    "sglang.kernels.ops.sampling.murmur_hash:murmur_hash32",
    "seed",
    "positions",
    "col_indices",
    what="replaced by PyTorch arithmetic",
    why="for CPU tensors it calls a kernel that the wheel lacks, so seeded sampling fails",
    until="it has a PyTorch path",
)
def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column), the source of seeded sampling (`sglang.kernels.ops.sampling`).

    Args:
        seed: [n] int64, hashed as two 32-bit words, low one first.
        positions: [n] integers, hashed modulo 2**32.
        col_indices: [m] integers, hashed modulo 2**32.

    Returns:
        [n, m] uint32.
    """
    assert seed.shape == positions.shape and seed.dim() == col_indices.dim() == 1
    seed, positions, columns = seed.long(), positions.long(), col_indices.long()
    state = torch.zeros_like(seed)
    for word in (seed, seed >> 32, positions):
        state = _murmur_mix(state, word & _MASK32)
    state = _murmur_mix(state[:, None], columns[None, :] & _MASK32)
    state = state ^ 16  # bytes hashed
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


@depends_on(
    "sglang.srt.batch_invariant_ops:enable_batch_invariant_mode",
    "enable_bmm",
    what="replaced by a warning",
    why="it puts Triton kernels in place of PyTorch's, and seeded sampling needs the flag that calls it",
    until="seeds act without --enable-deterministic-inference",
)
def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
    """Log what `--enable-deterministic-inference` gives on a CPU (`sglang.srt.batch_invariant_ops`)."""
    logger.warning(
        "On a CPU, --enable-deterministic-inference makes seeds act; results still round differently in other batches."
    )


@depends_on(
    "sglang.srt.constrained.xgrammar_backend:XGrammarGrammarBackend.apply_vocab_mask",
    "logits",
    "vocab_mask",
    what="replaced by XGrammar's own call, which the grammar objects make",
    why="it knows no CPU, so that the first request under --enable-strict-thinking ends the scheduler",
    until="it has a branch for the CPU (patches/0017)",
)
def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Forbid what a mask of XGrammar forbids (`sglang.srt.constrained.xgrammar_backend`).

    Args:
        logits: [n, vocabulary], written in place.
        vocab_mask: [n, vocabulary / 32] int32, a bit per token.
    """
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")


@depends_on(
    "torch.cuda:synchronize",
    "device",
    what="replaced by a function that returns at once",
    why="SGLang waits for the accelerator when it releases memory: in a CUDA build that is CUDA, present or not",
    until="SGLang asks the platform",
)
def synchronize(device: Any = None) -> None:
    """The CPU computes synchronously: there is nothing to wait for."""


_MASK32 = 0xFFFFFFFF


def _murmur_mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _times(_rotate_left(_times(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotate_left(state ^ word, 13) * 5 + 0xE6546B64) & _MASK32


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    # Both fit 32 bits, so their product may overflow int64; it wraps, which leaves the low 32 bits exact.
    return (x * factor) & _MASK32


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK32
