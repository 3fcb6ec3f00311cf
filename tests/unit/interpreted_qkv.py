"""`place_qkv` by Triton's interpreter, which has to be switched on before Triton is imported.

python -m tests.unit.interpreted_qkv CASES.pt, with TRITON_INTERPRET=1: adds what it returns and stores to every case.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from sglang_orthrus.models.qkv_kernel import place_qkv


def main(file: str) -> None:
    cases = torch.load(file)
    for case in cases:
        q_norm, k_norm = (SimpleNamespace(weight=case[f"{name}_weight"], variance_epsilon=case["eps"]) for name in "qk")
        caches = case["k_cache"], case["v_cache"]
        case["q"] = place_qkv(case["qkv"], *caches, q_norm, k_norm, case["cos_sin"], case["positions"], case["slots"])
    torch.save(cases, file)


if __name__ == "__main__":
    main(sys.argv[1])
