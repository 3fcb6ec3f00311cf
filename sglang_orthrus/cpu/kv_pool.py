"""The KV pool of the CPU platform."""

from __future__ import annotations

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_orthrus.compat.ledger import depends_on


@depends_on(
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._init_kv_copy_and_warmup",
    what="overridden: _kv_copy_config stays empty",
    why="it launches Triton to warm up",
    until="it asks the platform's supports_triton",
)
@depends_on(
    "sglang.srt.mem_cache.memory_pool:move_kv_cache_native",
    "k_buffer",
    "v_buffer",
    "tgt_loc",
    "src_loc",
    what="selected by the pool's use_native_move_kv_cache",
    why="the environment variable that selects it holds for every pool",
    until="SGLang asks the platform's supports_triton",
)
class CpuMHATokenToKVPool(MHATokenToKVPool):
    """SGLang's pool, with slots moved by PyTorch indexing instead of a Triton kernel."""

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None
        self.use_native_move_kv_cache = True
