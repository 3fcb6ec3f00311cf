"""The hierarchical cache's transfers between KV pool and host pool, where both are in the CPU's memory."""

from __future__ import annotations

from typing import Any

import torch

from sglang_orthrus.compat.ledger import depends_on

_WHY = "its transfers are CUDA kernels"
_UNTIL = "SGLang's host pools have a PyTorch path"


@depends_on(
    "sglang.srt.mem_cache.pool_host.mha:MHATokenToKVPoolHost.load_to_device_per_layer",
    "device_pool",
    "host_indices",
    "device_indices",
    "layer_id",
    "io_backend",
    what="replaced by PyTorch indexing; device_k_buffers, device_v_buffers, k_data_refs and v_data_refs are read",
    why=_WHY,
    until=_UNTIL,
)
def load_to_device_per_layer(
    pool: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    layer_id: int,
    io_backend: str,
    *,
    is_draft: bool = False,
) -> None:
    """Copy slots of one layer from the host pool. host_indices, device_indices: [tokens]"""
    pool.device_k_buffers[layer_id][device_indices] = pool.k_data_refs[layer_id][host_indices]
    pool.device_v_buffers[layer_id][device_indices] = pool.v_data_refs[layer_id][host_indices]


@depends_on(
    "sglang.srt.mem_cache.pool_host.mha:MHATokenToKVPoolHost.backup_from_device_all_layer",
    "device_pool",
    "host_indices",
    "device_indices",
    "io_backend",
    what="replaced by PyTorch indexing, as load_to_device_per_layer is",
    why=_WHY,
    until=_UNTIL,
)
def backup_from_device_all_layer(
    pool: Any, device_pool: Any, host_indices: torch.Tensor, device_indices: torch.Tensor, io_backend: str
) -> None:
    """Copy slots of all layers to the host pool. host_indices, device_indices: [tokens]"""
    for host, device in ((pool.k_data_refs, pool.device_k_buffers), (pool.v_data_refs, pool.device_v_buffers)):
        for into, source in zip(host, device, strict=True):
            into[host_indices] = source[device_indices]


@depends_on(
    "sglang.srt.mem_cache.pool_host.common:ALLOC_MEMORY_FUNCS",
    what="gets an entry for the CPU",
    why="the default registers the memory with CUDA",
    until=_UNTIL,
)
def allocate(dims: tuple[int, ...], *, dtype: torch.dtype, device: str, **_: Any) -> torch.Tensor:
    """The memory of a host pool, not pinned."""
    return torch.empty(dims, dtype=dtype, device=device)


def install_host_pool() -> None:
    """Put these functions in place of SGLang's."""
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    MHATokenToKVPoolHost.load_to_device_per_layer = load_to_device_per_layer
    MHATokenToKVPoolHost.backup_from_device_all_layer = backup_from_device_all_layer
    ALLOC_MEMORY_FUNCS["cpu"] = allocate
