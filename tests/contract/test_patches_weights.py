"""What the patches for updates of weights do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sglang.srt.managers import tokenizer_manager as stock
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput, UpdateWeightFromDiskReqOutput
from sglang.srt.model_executor.model_runner_components import weight_updater
from sglang.srt.model_loader import loader
from sglang.srt.utils.aio_rwlock import RWLock

from sglang_orthrus.compat.requests import update_weights_one_at_a_time
from tests.patching import as_shipped, patched_module

pytestmark = pytest.mark.contract


def _manager(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What takes updates in the process that answers HTTP, and in `sent` what goes to the scheduler."""
    monkeypatch.setattr(module, "get_model", lambda: SimpleNamespace(checkpoint_engine_wait_weights_before_ready=False))
    manager: Any = object.__new__(module.TokenizerManager)
    manager.elastic_worker_count, manager.mm_processor = 1, None
    manager.auto_create_handle_loop = lambda: None
    manager._update_model_path_info = lambda *args: None
    manager.sent = []
    manager._dispatch_to_scheduler = manager.sent.append
    manager.init_weight_update()
    assert isinstance(manager.model_update_lock, RWLock)
    return manager


async def _update_twice(manager: Any, paused: str) -> list[str]:
    """The messages that two updates get; the engine is paused not at all, before the first, or before the second."""

    async def others_run() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    manager.is_pause = paused == "before both"
    tasks = []
    for path in ("one", "two"):
        obj = UpdateWeightFromDiskReqInput(model_path=path, load_format="auto")
        tasks.append(asyncio.create_task(manager.update_weights_from_disk(obj)))
        await others_run()
        manager.is_pause = paused != "never"
    while manager.sent:
        path = manager.sent.pop(0).model_path
        answer = UpdateWeightFromDiskReqOutput(success=True, message=f"updated to {path}")
        manager._handle_update_weights_from_disk_req_output(answer)
        await others_run()
    return [message for _, message, _ in await asyncio.wait_for(asyncio.gather(*tasks), timeout=60)]


@pytest.mark.parametrize("paused", ["never", "before both", "between"])
def test_updates_from_disk_come_one_at_a_time(paused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shipped, the scheduler's second answer ends the server if the engine is paused. `compat` does as the patch."""
    as_shipped(monkeypatch, stock.TokenizerManager, "_wait_for_model_update_from_disk")
    expected = ["updated to one", "updated to two"]
    update = _update_twice(_manager(stock, monkeypatch), paused)
    if paused == "never":
        assert asyncio.run(update) == expected
    else:
        with pytest.raises(asyncio.InvalidStateError):
            asyncio.run(update)
    update_weights_one_at_a_time()
    assert asyncio.run(_update_twice(_manager(stock, monkeypatch), paused)) == expected
    patched = patched_module("0018", tmp_path, "tokenizer_manager")
    assert asyncio.run(_update_twice(_manager(patched, monkeypatch), paused)) == expected


class _Model(torch.nn.Module):
    """Loads its one weight as SGLang's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raises: ValueError if the weight has another shape or another name."""
        for name, loaded in weights:
            if name != "weight" or loaded.shape != self.weight.shape:
                raise ValueError(f"{name} does not fit")
            self.weight.data.copy_(loaded)


def _updater(module: ModuleType, model: _Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    arguments = SimpleNamespace(
        weight_cache_mode="off",
        weight_loader_disable_mmap=False,
        weight_loader_prefetch_checkpoints=False,
        weight_loader_prefetch_num_threads=1,
        weight_loader_drop_cache_after_load=False,
    )
    for owner in (module, loader):
        monkeypatch.setattr(owner, "get_model", lambda: arguments)
    monkeypatch.setattr(loader, "get_server_args", lambda: None)
    monkeypatch.setattr(module, "get_pp_stage_load_group", lambda: None)
    config = SimpleNamespace(
        model_path=str(folder), revision=None, dtype=torch.float32, quantization=None, hf_config=SimpleNamespace()
    )
    return module.WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=config,
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=lambda *args, **kwargs: None,
        recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: None,
    )


def _folder(path: Path, **tensors: torch.Tensor) -> Path:
    path.mkdir()
    if tensors:
        save_file(tensors, path / "model.safetensors")
    return path


def test_a_failed_update_rolls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shipped, the rollback reads the folder that has just failed, and raises."""
    good = _folder(tmp_path / "good", weight=torch.ones(2))
    other = _folder(tmp_path / "other", weight=torch.full((2,), 2.0))
    wrong = _folder(tmp_path / "wrong", weight=torch.full((2,), 3.0), z=torch.ones(1))
    empty = _folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="z does not fit"):
        _updater(weight_updater, _Model(), good, monkeypatch).update_weights_from_disk(str(wrong), "auto")

    model = _Model()
    patched = patched_module("0022", tmp_path / "patched", "weight_updater")
    updater = _updater(patched, model, good, monkeypatch)
    for folder, value, path in (
        (good, 1, good),
        (wrong, 1, good),
        (other, 2, other),
        (empty, 2, other),
        (wrong, 2, other),
    ):
        is_done, message = updater.update_weights_from_disk(str(folder), "auto")
        assert is_done == (folder == path), message
        assert model.weight.tolist() == [value, value]
        assert updater.model_config.model_path == str(path)
