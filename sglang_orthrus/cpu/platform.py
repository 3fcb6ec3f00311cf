"""The CPU as an SGLang platform: entry point `orthrus_cpu` of the group `sglang.srt.platforms`.

SGLang 0.5.23 serves on CPU only with kernels that its CUDA wheel lacks. This platform declares no kernels at all, so
that SGLang takes its PyTorch paths, and supplies the few that have none (`sglang_orthrus.cpu.replacements`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_orthrus.compat.ledger import EXTENSION_POINT, depends_on

ATTENTION_BACKEND = "torch_native"
DEFAULT_MAX_RUNNING_REQUESTS = 48
DEFAULT_MAX_TOTAL_TOKENS = 65536


def activate() -> str | None:
    """Name the platform class, or None where SGLang has something better.

    That is on a machine with an accelerator (hide it, e.g. with `CUDA_VISIBLE_DEVICES=`, to serve on its CPU), and
    with `SGLANG_USE_CPU_ENGINE=1`, which asks for SGLang's own CPU kernels. With another platform plugin installed,
    `SGLANG_PLATFORM=orthrus_cpu` picks this one.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or torch.accelerator.is_available():
        return None
    return f"{__name__}:{OrthrusCpuPlatform.__name__}"


@depends_on(
    "sglang.srt.platforms.cpu:CpuDeviceMixin",
    what="mixed into the platform class; overrides get_device, get_torch_profiler_activity and "
    "get_torch_profiler_activity_str",
    why="it is SGLang's own answer to the device questions",
    until=EXTENSION_POINT,
)
class OrthrusCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain PyTorch on the CPU: no Triton, no graphs, no compiler."""

    _enum = PlatformEnum.OOT

    def __init__(self) -> None:
        # SGLang decorates small functions with torch.compile while it is imported, which is after this: compiling
        # them needs g++ and tens of seconds on their first call, and gains nothing on a CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # By default OpenMP threads spin long while they wait for each other, and stall as soon as anything else wants
        # their cores: small matrix products took 60 times as long. A short spin costs nothing on idle cores. OpenMP
        # reads this when a process starts, so the scheduler sees it.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    def init_backend(self) -> None:
        """Called in every process that runs a model, before its pools are made."""
        from sglang_orthrus.cpu.replacements import install_cpu_kernels

        install_cpu_kernels()

    def get_device(self, device_id: int = 0) -> str:
        """The device's name. Not a `torch.device`, since it becomes the value of `--device` if that is unset."""
        return self.device_type

    def get_default_attention_backend(self) -> str:
        """SGLang's own PyTorch attention; a speculative worker may install another for its own passes."""
        return ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """True for every name: algorithms that need CUDA refuse the device themselves."""
        return True

    def get_torch_profiler_activity_str(self) -> str:
        """Asked for by /start_profile, whose "GPU" means CUDA."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """The same as a value."""
        return torch.profiler.ProfilerActivity.CPU

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """The pool for ordinary multi-head attention; other kinds keep SGLang's classes."""
        if kind != "mha":
            return None
        from sglang_orthrus.cpu.kv_pool import CpuMHATokenToKVPool

        return CpuMHATokenToKVPool

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what SGLang would choose badly on a CPU; flags that the user gave stay.

        - `--device cpu` resolves to the `intel_amx` attention backend before a platform is asked.
        - `auto` makes float16 of a float32 checkpoint; and in float32 a row computed alone and in a block differ so
          little that speculation changes no token but at the narrowest ties.
        - The KV pool would take nearly all of the machine's memory, and half a minute to be zeroed.
        - An idle scheduler would keep a core busy.
        - `--enable-deterministic-inference`, without which seeds have no effect, knows no attention backend of ours.
        """
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
        server_args.sleep_on_idle = True
        _allow_deterministic_inference()


@depends_on(
    "sglang.srt.server_args:add_deterministic_attention_backend_choices",
    "iterable",
    what="called with torch_native",
    why="--enable-deterministic-inference refuses other attention backends",
    until=EXTENSION_POINT,
)
def _allow_deterministic_inference() -> None:
    from sglang.srt import server_args

    if ATTENTION_BACKEND not in server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        server_args.add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
