"""Puts the CPU platform's functions in place of SGLang's at run time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sglang_orthrus.cpu import kernels
from sglang_orthrus.cpu.host_pool import install_host_pool

REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func": kernels.assign_req_to_token_pool_func,
    "sglang.kernels.ops.sampling.murmur_hash:murmur_hash32": kernels.murmur_hash32,
    "sglang.srt.batch_invariant_ops:enable_batch_invariant_mode": kernels.enable_batch_invariant_mode,
    "torch.cuda:synchronize": kernels.synchronize,
}


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
    install_host_pool()


def _mask_on_cpu() -> None:
    """`REPLACEMENTS` holds functions of modules; this one is a class's."""
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    XGrammarGrammarBackend.apply_vocab_mask = staticmethod(kernels.apply_vocab_mask)
