"""The hierarchical cache's transfers on a CPU, there and back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_orthrus.cpu.host_pool import backup_from_device_all_layer, load_to_device_per_layer

LAYERS, SLOTS, HOST_SLOTS, HEAD = 3, 20, 40, (2, 4)


def _pool(is_page_first: bool) -> SimpleNamespace:
    """A host pool as SGLang lays it out: by slot and layer, or by layer and slot; and the device's buffers."""

    def host() -> list[torch.Tensor]:
        if is_page_first:
            return list(torch.zeros(HOST_SLOTS, LAYERS, *HEAD).transpose(0, 1))
        return list(torch.zeros(LAYERS, HOST_SLOTS, *HEAD))

    return SimpleNamespace(
        k_data_refs=host(),
        v_data_refs=host(),
        device_k_buffers=tuple(torch.randn(SLOTS, *HEAD) for _ in range(LAYERS)),
        device_v_buffers=tuple(torch.randn(SLOTS, *HEAD) for _ in range(LAYERS)),
    )


@pytest.mark.parametrize("is_page_first", [True, False])
def test_what_goes_to_the_host_comes_back_to_other_slots(is_page_first: bool) -> None:
    pool = _pool(is_page_first)
    buffers = (*pool.device_k_buffers, *pool.device_v_buffers)
    before = [buffer.clone() for buffer in buffers]
    evicted, host, loaded = torch.tensor([3, 17, 5]), torch.tensor([39, 0, 8]), torch.tensor([2, 6, 19])
    backup_from_device_all_layer(pool, None, host, evicted, "kernel")
    for buffer in buffers:
        buffer[evicted] = 0.0
    for layer in range(LAYERS):
        load_to_device_per_layer(pool, None, host, loaded, layer, "kernel")
    for old, new in zip(before, buffers, strict=True):
        torch.testing.assert_close(new[loaded], old[evicted], rtol=0, atol=0)
        untouched = [slot for slot in range(SLOTS) if slot not in {*evicted.tolist(), *loaded.tolist()}]
        torch.testing.assert_close(new[untouched], old[untouched], rtol=0, atol=0)
