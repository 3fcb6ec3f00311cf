"""On which batches rounds are timed at start-up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache import allocation

from sglang_orthrus.cpu import kernels
from sglang_orthrus.passes import timing


def test_sizes_are_powers_of_two_and_the_largest() -> None:
    assert timing.batch_sizes(1) == [1]
    assert timing.batch_sizes(48) == [1, 2, 4, 8, 16, 32, 48]


def test_every_token_has_a_slot_of_its_own() -> None:
    slots = timing._slots(3, 5, torch.device("cpu"), all_first=False)
    assert slots.shape == (3, 5) and sorted(slots.flatten().tolist()) == list(range(15))


def test_the_kernel_that_writes_slots_is_compiled_for_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has one for addresses that 16 divides, and one for others."""
    addresses = set[int]()

    def assign(*args: Any) -> None:
        addresses.add(args[4].data_ptr() % 16)
        kernels.assign_req_to_token_pool_func(*args)

    monkeypatch.setattr(allocation, "assign_req_to_token_pool_func", assign)
    table = torch.zeros((4, 6), dtype=torch.int32)
    timing._write_slots(torch.tensor([3, 1]), table, torch.arange(10, 20).view(2, 5))
    assert table.tolist() == [[0] * 6, [15, 16, 17, 18, 19, 0], [0] * 6, [10, 11, 12, 13, 14, 0]]
    assert addresses == {0, 8}


def test_a_pool_that_is_sized_after_capture_has_its_first_slot_only() -> None:
    """Its other slots have no memory yet: to touch them would end the server."""
    assert not timing._slots(3, 5, torch.device("cpu"), all_first=True).any()
    assert timing._has_one_page(SimpleNamespace(token_to_kv_pool=SimpleNamespace(post_capture_active=True)))
    assert not timing._has_one_page(SimpleNamespace(token_to_kv_pool=SimpleNamespace()))


@pytest.mark.parametrize("is_late", [False, True], ids=["sized before capture", "sized after capture"])
def test_contexts_are_timed_where_they_have_memory(is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of context takes a microsecond here, a round of width W another W milliseconds."""
    runner = SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(post_capture_active=is_late),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(65, 4096)),
        max_total_num_tokens=100_000,
    )

    def seconds(passes: Any, model_runner: Any, batch: tuple[int, int], width: int) -> float:
        size, context = batch
        return width * 1e-3 + size * context * 1e-6

    monkeypatch.setattr(timing, "_batch", lambda model_runner, size, context, width: (size, context))
    monkeypatch.setattr(timing, "_time", seconds)
    sizes = {1: timing.batch_sizes(64), 8: timing.batch_sizes(16)}
    passes: Any = None
    times = timing.time_rounds(passes, runner, sizes, seconds=60.0)
    assert times.context == 512
    assert {width: list(found) for width, found in times.seconds.items()} == sizes
    assert times.seconds[8][16] == pytest.approx(8e-3 + 16 * 512 * 1e-6)
    assert times.context_seconds == ({} if is_late else pytest.approx({1: 1e-6, 8: 1e-6}))


@pytest.mark.parametrize(("seconds", "num_timed", "slowed"), [(60.0, 6, 1.0), (-1.0, 1, 3.0)])
def test_a_machine_that_is_slow_for_a_while_is_timed_again(
    seconds: float, num_timed: int, slowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If there is time. The smallest batch is always timed."""
    runner = SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(post_capture_active=True),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(65, 4096)),
        max_total_num_tokens=100_000,
    )
    timed = list[int]()

    def took(passes: Any, model_runner: Any, size: int, width: int) -> float:
        timed.append(size)
        return size * (3e-3 if len(timed) <= 3 else 1e-3)

    monkeypatch.setattr(timing, "_batch", lambda model_runner, size, context, width: size)
    monkeypatch.setattr(timing, "_time", took)
    passes: Any = None
    times = timing.time_rounds(passes, runner, {1: [1, 2, 4]}, seconds)
    assert len(timed) == num_timed
    assert times.seconds[1][1] == pytest.approx(slowed * 1e-3)
