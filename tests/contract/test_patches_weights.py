"""What the patches for updates of weights do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import tokenizer_manager as stock
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput, UpdateWeightFromDiskReqOutput
from sglang.srt.utils.aio_rwlock import RWLock

from sglang_orthrus.compat.requests import update_weights_one_at_a_time
from tests.patching import patched_module

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
    expected = ["updated to one", "updated to two"]
    update = _update_twice(_manager(stock, monkeypatch), paused)
    if paused == "never":
        assert asyncio.run(update) == expected
    else:
        with pytest.raises(asyncio.InvalidStateError):
            asyncio.run(update)
    monkeypatch.setattr(
        stock.TokenizerManager,
        "_wait_for_model_update_from_disk",
        stock.TokenizerManager._wait_for_model_update_from_disk,
    )
    update_weights_one_at_a_time()
    assert asyncio.run(_update_twice(_manager(stock, monkeypatch), paused)) == expected
    patched = patched_module("0018", tmp_path, "tokenizer_manager")
    assert asyncio.run(_update_twice(_manager(patched, monkeypatch), paused)) == expected
