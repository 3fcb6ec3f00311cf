"""Precision and attention backends in which two servers are compared, and what may differ there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.common.equality import NEAR_TIE, PROMPTS_PER_EXCUSE
from sglang_orthrus.config import LARGEST, WIDTHS

# Rounds can be counted and compared only if their width does not follow the clock.
ONE_WIDTH = {WIDTHS: LARGEST}
# Measured on an H200 over 12,380 rows: half of the gaps do not change, 1 % change by 0.19 or more, none by more than
# 0.3125. bf16 logits of this size lie 0.0625 or 0.125 apart.
BF16_NEAR_TIE = 0.375


@dataclass(frozen=True)
class Setup:
    """Precision and attention backend of both servers, and what may differ there.

    Attributes:
        tie_below: top-2 gap below which rounding may decide.
        prompts_per_excuse: see `Tally`.
    """

    args: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: ONE_WIDTH)
    tie_below: float = NEAR_TIE
    prompts_per_excuse: int | None = PROMPTS_PER_EXCUSE


_GPU_ARGS = (
    *("--mem-fraction-static", "0.8", "--max-total-tokens", "65536", "--max-running-requests", "48"),
    *("--cuda-graph-max-bs-decode", "8", "--cuda-graph-backend-prefill", "disabled"),
)
SETUPS = {
    "cpu": Setup(("--dtype", "float32")),
    # FlashInfer has no fp32 kernels, SGLang's own norm, activation and rotary kernels neither, and Triton's default is
    # TF32.
    "triton-fp32": Setup(
        ("--dtype", "float32", "--attention-backend", "triton", *_GPU_ARGS),
        {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch", "TRITON_F32_DEFAULT": "ieee", **ONE_WIDTH},
    ),
    **{
        f"{backend}-bf16": Setup(
            ("--dtype", "bfloat16", "--attention-backend", backend, *_GPU_ARGS),
            tie_below=BF16_NEAR_TIE,
            prompts_per_excuse=None,
        )
        for backend in ("flashinfer", "fa3")
    },
}
