"""Muon for matrices and AdamW for the rest, batched over equal shapes so that a step is few kernel launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices, for a stack [n, rows, columns]."""
    a, b, c = _COEFFICIENTS
    x = stack.bfloat16() if stack.is_cuda else stack.float()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, scaled to the typical update size of Adam; decoupled weight decay."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append((p, p.grad))
            for shape, pairs in shapes.items():
                params, grads = [p for p, _ in pairs], [grad for _, grad in pairs]
                momenta = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    momenta.append(state["momentum"])
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                update = orthogonalise(torch.stack(list(nesterov)))
                torch._foreach_mul_(params, 1 - group["lr"] * group["decay"])
                torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def make_optimizers(
    weights: dict[str, nn.Parameter], lr: float, muon: bool, device: torch.device
) -> list[torch.optim.Optimizer]:
    """Muon (or AdamW) on the layers' matrices at `lr`; AdamW on embedding and norms at half of it, norms undecayed."""
    matrices = [p for name, p in weights.items() if p.ndim == 2 and "embed" not in name]
    embedding = [p for name, p in weights.items() if "embed" in name]
    vectors = [p for p in weights.values() if p.ndim == 1]
    small = lr / 2 if muon else lr
    groups: list[dict[str, Any]] = [
        {"params": embedding, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not muon:
        groups.append({"params": matrices, "weight_decay": 0.1})
    adam = torch.optim.AdamW(groups, lr=small, betas=(0.9, 0.95), fused=device.type == "cuda")
    optimizers: list[torch.optim.Optimizer] = [adam]
    if muon:
        optimizers.append(Muon(matrices, lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
