"""What the CPU platform changes in SGLang at run time, and the ledger of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sglang_orthrus.compat.ledger import Touch
from sglang_orthrus.cpu import kernels

REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func": kernels.assign_req_to_token_pool_func,
    "sglang.kernels.ops.sampling.murmur_hash:murmur_hash32": kernels.murmur_hash32,
    "sglang.srt.batch_invariant_ops:enable_batch_invariant_mode": kernels.enable_batch_invariant_mode,
    "torch.cuda:synchronize": kernels.synchronize,
}

_FORWARD_PARAMS = ("q", "k", "v", "layer", "forward_batch", "save_kv_cache")

CPU_TOUCHES: tuple[Touch, ...] = (
    Touch(
        "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func",
        ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "out_cache_loc", "batch_size"),
        "replaced by PyTorch indexing",
        "it launches Triton unless SGLANG_USE_CPU_ENGINE=1, which needs kernels that the wheel lacks",
        "it asks the platform's supports_triton, as the paged allocator does",
    ),
    Touch(
        "sglang.kernels.ops.sampling.murmur_hash:murmur_hash32",
        ("seed", "positions", "col_indices"),
        "replaced by PyTorch arithmetic",
        "for CPU tensors it calls a kernel that the wheel lacks, so seeded sampling fails",
        "it has a PyTorch path",
    ),
    Touch(
        "sglang.srt.batch_invariant_ops:enable_batch_invariant_mode",
        ("enable_bmm",),
        "replaced by a warning",
        "it puts Triton kernels in place of PyTorch's, and seeded sampling needs the flag that calls it",
        "seeds act without --enable-deterministic-inference",
    ),
    Touch(
        "torch.cuda:synchronize",
        ("device",),
        "replaced by a function that returns at once",
        "SGLang waits for the accelerator when it releases memory: in a CUDA build that is CUDA, present or not",
        "SGLang asks the platform",
    ),
    Touch(
        "sglang.srt.constrained.xgrammar_backend:XGrammarGrammarBackend.apply_vocab_mask",
        ("logits", "vocab_mask"),
        "replaced by XGrammar's own call, which the grammar objects make",
        "it knows no CPU, so that the first request under --enable-strict-thinking ends the scheduler (patches/0017)",
        "it has a branch for it",
    ),
    Touch(
        "sglang.srt.server_args:add_deterministic_attention_backend_choices",
        ("iterable",),
        "called with torch_native",
        "--enable-deterministic-inference refuses other attention backends",
        "never: it is the seam",
    ),
    Touch(
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._init_kv_copy_and_warmup",
        ("self",),
        "overridden in our subclass, which the platform's get_kv_pool_cls returns",
        "it launches Triton to warm up",
        "it asks the platform's supports_triton",
    ),
    Touch(
        "sglang.srt.mem_cache.memory_pool:move_kv_cache_native",
        ("k_buffer", "v_buffer", "tgt_loc", "src_loc"),
        "selected by use_native_move_kv_cache in our pool",
        "the environment variable that selects it holds for every pool",
        "as above",
    ),
    Touch(
        "sglang.srt.mem_cache.memory_pool:KVWriteLoc",
        ("loc", "swa_loc"),
        "constructed to write a block's K/V",
        "it is the pool's argument",
        "never: attention backends share it",
    ),
    Touch(
        "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.__init__",
        ("model_runner",),
        "subclassed",
        "it cannot verify a block: extend_prefix_lens is None there",
        "it serves TARGET_VERIFY",
    ),
    Touch(
        "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend",
        _FORWARD_PARAMS,
        "overridden",
        "as above, and it computes every query of a cached prefix again",
        "as above",
    ),
    Touch(
        "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.init_forward_metadata",
        ("forward_batch",),
        "extended",
        "the plan of a pass is made once, not once per layer",
        "as above",
    ),
    Touch(
        "sglang.srt.platforms.cpu:CpuDeviceMixin",
        (),
        "mixed into the platform class",
        "it is SGLang's own answer to the device questions",
        "never: it is the seam",
    ),
)


def install_cpu_kernels() -> None:
    """Put our functions in place of SGLang's, also where they were imported by name; a second call changes nothing.

    Must run in the scheduler process before it takes requests.
    """
    for target, replacement in REPLACEMENTS.items():
        module_name, attribute = target.split(":")
        owner = import_module(module_name)
        stock = getattr(owner, attribute)
        if stock is replacement:
            continue
        importers = (module for name, module in list(sys.modules.items()) if name.startswith("sglang."))
        for module in (owner, *importers):
            if vars(module).get(attribute) is stock:
                setattr(module, attribute, replacement)
    _mask_on_cpu()


def _mask_on_cpu() -> None:
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    XGrammarGrammarBackend.apply_vocab_mask = staticmethod(kernels.apply_vocab_mask)
