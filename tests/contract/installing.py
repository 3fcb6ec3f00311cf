"""Install all that changes SGLang in a process that nothing has changed yet, and tell what became of it.

python -m tests.contract.installing prints JSON: parameters of the replaced functions (stock, ours), whether the
replacements are installed and reach imports by name, and which of the ledger's wrappers are in place.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from typing import Any

from sglang.srt.mem_cache import allocation
from sglang.srt.speculative import spec_utils

from sglang_orthrus.compat import ledger
from sglang_orthrus.compat.install import install_in_http_server, install_in_scheduler
from sglang_orthrus.compat.requests import RequestChecks
from sglang_orthrus.cpu.replacements import REPLACEMENTS, install_cpu_kernels


def parameters(function: Any) -> list[list[str]]:
    """Name, kind and default of each."""
    return [[p.name, str(p.kind), repr(p.default)] for p in inspect.signature(function).parameters.values()]


def is_the_same() -> bool:
    """Whether a function that SGLang imports by name is the one in the module that it comes from."""
    return bool(spec_utils.assign_req_to_token_pool_func is allocation.assign_req_to_token_pool_func)


def replaced() -> dict[str, Any]:
    """Install the CPU kernels, twice, which must do no harm."""
    stock = {target: parameters(pkgutil.resolve_name(target)) for target in REPLACEMENTS}
    ours = {target: parameters(function) for target, function in REPLACEMENTS.items()}
    assert is_the_same()
    for _ in range(2):
        install_cpu_kernels()
    installed = all(pkgutil.resolve_name(target) is function for target, function in REPLACEMENTS.items())
    return {"stock": stock, "ours": ours, "installed": installed, "by_name": is_the_same()}


def wrapped() -> dict[str, bool]:
    """Install the wrappers; whether each is there."""
    install_in_http_server(RequestChecks(*[lambda *args: None] * 4))
    install_in_scheduler(32, lambda req: None, lambda folder: None)
    targets = [entry.target for entry in ledger.entries() if entry.what.startswith("wrapped")]
    return {target: getattr(pkgutil.resolve_name(target), "_sglang_orthrus", False) for target in targets}


if __name__ == "__main__":
    print(json.dumps(replaced() | {"wrapped": wrapped()}))
