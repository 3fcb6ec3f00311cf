"""Tensor parallelism: several processes, the ranks, run the same rounds, each on its share of every layer.

What a clock or a random draw decides could differ between them. Rank 0 decides it, and the others take it over. With
one rank, nothing here does anything.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_orthrus.compat.ledger import SHARED_BY_WORKERS, depends_on

# SGLang's `GroupCoordinator` of the tensor-parallel ranks; None for a single one.
_group: Any = None


def use_group(group: Any) -> None:
    """Take SGLang's group of tensor-parallel ranks from now on; None, or a group of one, for a single rank."""
    global _group
    _group = group if group is not None and group.world_size > 1 else None


def are_several() -> bool:
    """Whether there is more than one rank."""
    return _group is not None


def is_first() -> bool:
    """Whether this is rank 0, which decides."""
    return _group is None or _group.rank_in_group == 0


@depends_on(
    "sglang.srt.distributed.parallel_state:GroupCoordinator.broadcast",
    "input_",
    "src",
    what="called for what a clock or a draw decides",
    why="ranks must agree on it",
    until=SHARED_BY_WORKERS,
)
def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values in this tensor, which is contiguous and has the same shape on all ranks; the tensor itself."""
    return tensor if _group is None else _group.broadcast(tensor, src=0)


def numbers_from_first(numbers: list[int]) -> list[int]:
    """Rank 0's numbers. Others give a list of the same length. Waits for rank 0's host, and for no device."""
    if _group is None:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.int64)
    torch.distributed.broadcast(tensor, src=_group.ranks[0], group=_group.cpu_group)
    return tensor.tolist()


@depends_on(
    "sglang.srt.distributed.parallel_state:GroupCoordinator._all_gather_into_tensor",
    "output",
    "input",
    what="called for the best tokens of every rank's share of the vocabulary",
    why="each rank's head has a share of it; the public call is an operator that platforms like ours lack",
    until="SGLang registers its operators for the device of such a platform",
)
def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks, one behind the other: [n, ...] -> [ranks, n, ...]. Can be part of a CUDA graph."""
    if _group is None:
        return tensor[None]
    found = tensor.new_empty(_group.world_size, *tensor.shape)
    _group._all_gather_into_tensor(found.view(-1, *tensor.shape[1:]), tensor.contiguous())
    return found


def offset(width: int) -> int:
    """Where this rank's share begins, if every rank has so much."""
    return 0 if _group is None else int(_group.rank_in_group) * width
