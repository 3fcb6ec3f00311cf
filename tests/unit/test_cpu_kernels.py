"""The PyTorch kernels of the CPU platform, and the round's own, against SGLang's Triton kernels, interpreted."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import pytest
import torch

from sglang_orthrus.cpu.kernels import assign_req_to_token_pool_func, murmur_hash32
from sglang_orthrus.passes.blocks import draft_block
from sglang_orthrus.sampling.acceptance import accept_greedy
from tests.unit import interpreted


def _assign_case(seed: int, bs: int, lengths: list[int], dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (bs,), generator=g).to(dtype)
    length = torch.tensor(lengths, dtype=dtype)
    return {
        "req_pool_indices": torch.randperm(20, generator=g)[:bs],
        "req_to_token": torch.randint(0, 1000, (20, 128), generator=g, dtype=torch.int32),
        "start_offset": start,
        "end_offset": start + length,
        "out_cache_loc": torch.randint(1, 100_000, (int(length.sum()),), generator=g),
        "batch_size": bs,
    }


def _murmur_case(seed: int, rows: int, columns: torch.Tensor) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    edges = torch.tensor([0, 1, -1, 2**31 - 1, 2**32, 2**63 - 1, -(2**63)])
    seeds = torch.cat((edges, torch.randint(-(2**62), 2**62, (rows,), generator=g)))
    positions = torch.randint(0, 2**31 - 1, (len(seeds),), generator=g)
    positions[0] = 0
    return {"seed": seeds, "positions": positions, "col_indices": columns}


def _block_case(seed: int, bs: int, width: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "anchors": torch.randint(0, 5000, (bs,), generator=g),
        "prefix_lens": torch.randint(1, 60, (bs,), generator=g),
        "req_pool_indices": torch.randperm(16, generator=g)[:bs],
        "req_to_token": torch.randint(0, 1000, (16, 100), generator=g, dtype=torch.int32),
        "width": width,
        "mask_token_id": 4095,
    }


def _accept_case(seed: int, bs: int, width: int) -> dict[str, Any]:
    """Rows of two token ids, so that short, long, full and empty agreements all occur."""
    g = torch.Generator().manual_seed(seed)
    block = torch.randint(0, 2, (bs, width), generator=g)
    predictions = torch.randint(0, 2, (bs, width), generator=g)
    for row in range(bs):
        agreeing = int(torch.randint(0, width, (1,), generator=g))
        predictions[row, :agreeing] = block[row, 1 : agreeing + 1]
    predictions[0, : width - 1] = block[0, 1:]
    predictions[-1, 0] = block[-1, 1] + 1
    return {"block": block, "predictions": predictions, "prefix_lens": torch.randint(1, 999, (bs,), generator=g)}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("assign", _assign_case(0, 1, [0], torch.int32)),
    ("assign", _assign_case(1, 1, [64], torch.int64)),
    ("assign", _assign_case(2, 5, [0, 31, 32, 33, 0], torch.int32)),
    ("assign", _assign_case(3, 7, [1, 0, 64, 5, 16, 0, 80], torch.int64)),
    ("murmur", _murmur_case(0, 9, torch.arange(1500))),
    ("murmur", _murmur_case(1, 0, torch.tensor([0, 1, 2**31 - 1, 151_935], dtype=torch.int32))),
    ("block", _block_case(0, 1, 2)),
    ("block", _block_case(1, 3, 32)),
    ("block", _block_case(2, 9, 17)),
    ("accept", _accept_case(0, 2, 2)),
    ("accept", _accept_case(1, 8, 32)),
    ("accept", _accept_case(2, 33, 5)),
]


@pytest.fixture(scope="module")
def originals(interpreter: Executor) -> list[Any]:
    """What SGLang's kernels return for every case."""
    return interpreter.submit(interpreted.originals, CASES).result()


def _pairs(name: str, originals: list[Any]) -> list[tuple[dict[str, Any], Any]]:
    return [(case[1], result) for case, result in zip(CASES, originals, strict=True) if case[0] == name]


def test_slots_are_written_where_the_triton_kernel_writes_them(originals: list[Any]) -> None:
    for arguments, expected in _pairs("assign", originals):
        table = arguments["req_to_token"].clone()
        assign_req_to_token_pool_func(**{**arguments, "req_to_token": table})
        assert torch.equal(table, expected)
    assert any(not torch.equal(a["req_to_token"], e) for a, e in _pairs("assign", originals))


def test_hashes_equal_the_triton_kernels(originals: list[Any]) -> None:
    for arguments, expected in _pairs("murmur", originals):
        hashed = murmur_hash32(**arguments)
        assert hashed.dtype == expected.dtype == torch.uint32
        assert torch.equal(hashed.long(), expected.long())


def test_the_draft_block_equals_dflash_s(originals: list[Any]) -> None:
    for arguments, (ids, positions, slots) in _pairs("block", originals):
        block = draft_block(**arguments)
        assert torch.equal(block.ids, ids)
        assert torch.equal(block.positions, positions)
        assert torch.equal(block.slots, slots)


def test_acceptance_equals_dflash_s(originals: list[Any]) -> None:
    seen = set()
    for arguments, (accept_lens, tokens, bonus, new_seq_lens) in _pairs("accept", originals):
        verdict = accept_greedy(**arguments)
        assert torch.equal(verdict.accept_lens, accept_lens)
        assert torch.equal(verdict.bonus, bonus)
        assert torch.equal(verdict.new_seq_lens, new_seq_lens)
        # Columns past the accepted ones are padding, which the two fill differently.
        for row, length in enumerate(accept_lens.tolist()):
            assert torch.equal(verdict.tokens[row, :length], tokens[row, :length])
            seen.add(length)
    assert {1, 2, 32} <= seen
