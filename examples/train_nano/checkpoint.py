"""Training checkpoints: weights, optimizer state and progress, in safetensors shards below 15 MB."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.train_nano.model import NanoConfig, OrthrusLM

SHARD_BYTES = 14_500_000


@dataclass(slots=True)
class Progress:
    """How far a run is; `history` holds one entry per probe of the held-out rows."""

    stage: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    chunk: int = 0
    row: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def _save_shards(tensors: dict[str, Tensor], folder: Path, prefix: str) -> None:
    for old in folder.glob(f"{prefix}-*.safetensors"):
        old.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if size and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += nbytes
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"{prefix}-{i}.safetensors")


def _load_shards(folder: Path, prefix: str) -> dict[str, Tensor]:
    paths = sorted(folder.glob(f"{prefix}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no {prefix}-*.safetensors in {folder}")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def save(
    folder: Path, model: OrthrusLM, progress: Progress, optimizers: list[torch.optim.Optimizer], full: bool
) -> None:
    """Writes a checkpoint; without `full` it holds no optimizer state and can start a run but not continue one.

    The AR stage leaves out the `*_diff` weights, which are then still copies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if progress.stage == "diff" or "_diff" not in name
    }
    _save_shards(weights, folder, "weights")
    state: dict[str, Tensor] = {}
    for i, optimizer in enumerate(optimizers if full else []):
        for index, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                state[f"{i}.{index}.{key}"] = value
    _save_shards(state, folder, "optimizer")
    if not full:
        (folder / "optimizer-0.safetensors").unlink()
    document = {"progress": asdict(progress), "config": asdict(model.config), "full": full}
    (folder / "state.json").write_text(json.dumps(document, indent=1) + "\n")


def load_model(folder: Path) -> tuple[OrthrusLM, Progress]:
    """The model and progress of a checkpoint; missing `*_diff` weights start as copies of the AR view's."""
    document = json.loads((folder / "state.json").read_text())
    model = OrthrusLM(NanoConfig(**document["config"]))
    weights = _load_shards(folder, "weights")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any("_diff" not in name for name in missing):
        raise ValueError(f"{folder} does not fit the model: missing {missing}, unexpected {unexpected}")
    if missing:
        model.copy_views()
    return model, Progress(**document["progress"])


def load_optimizers(folder: Path, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restores optimizer state; raises FileNotFoundError if the checkpoint was saved without it."""
    state = _load_shards(folder, "optimizer")
    for i, optimizer in enumerate(optimizers):
        document = optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            which, index, key = name.split(".")
            if int(which) == i:
                entries.setdefault(int(index), {})[key] = tensor
        document["state"] = entries
        optimizer.load_state_dict(document)
