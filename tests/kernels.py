"""SGLang's CUDA kernels where there is no CUDA: the Python around them can be imported, and they can't be run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

PACKAGE = "sgl_kernel"


@contextmanager
def importable_kernels() -> Iterator[None]:
    """For the duration `sgl_kernel` is a package of its own files, without its libraries, if those can't be loaded."""
    try:
        importlib.import_module(PACKAGE)
    except ImportError:
        pass
    else:
        yield
        return
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    package: Any = ModuleType(PACKAGE)
    package.__path__ = list(spec.submodule_search_locations)
    package.flash_ops = package.merge_state_v2 = None
    sys.modules[PACKAGE] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
