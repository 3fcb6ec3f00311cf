"""What choosing the tokens of many sampled requests takes on top of the model; on a CPU with a small vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_orthrus.adjust import Adjustments
from sglang_orthrus.choice import TokenChoice
from sglang_orthrus.rows import SAMPLED_ROWS
from tests.sampling import decode_batch

REQUESTS, WIDTH, HIDDEN = 128, 32, 64
# In units of one piece's fp32 logits, [128, V]: some ten copies of them live at once, indices of a sort counting twice.
# All rows of the batch are 32 pieces, so a path that is dense anywhere would take 32 and more.
BOUND = 16


class Head:
    """The model's head on hidden states, which is all that choosing asks of it."""

    def __init__(self, vocab_size: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weights = torch.randn(HIDDEN, vocab_size, generator=generator).to(device) / 4

    def logits(self, hidden_states: torch.Tensor, *, in_fp32: bool = True) -> torch.Tensor:
        return hidden_states.flatten(0, 1) @ self._weights


class Peak(TorchDispatchMode):
    """The largest sum of all storages that operations made while it is on; their inner workspaces are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self._live[ref.cdata] = ref, storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return result


def choose(head: Head, options: dict[str, Any], vocab_size: int, device: str, backend: str) -> torch.Tensor:
    """One round of all requests: the lengths that they accept, [bs]."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(REQUESTS, WIDTH, HIDDEN, generator=generator).to(device)
    prefix_lens = torch.arange(REQUESTS, device=device)
    anchors = torch.zeros(REQUESTS, dtype=torch.int64, device=device)
    batch = decode_batch([options] * REQUESTS, prefix_lens, vocab_size=vocab_size)
    chooser = TokenChoice(head, batch, anchors, Adjustments(batch, None, {}), WIDTH, backend)
    # Row j of either view predicts the same token, so equal states accept every draft and others hardly any.
    drafts = chooser.draft(torch.where(torch.arange(WIDTH - 1, device=device)[:, None] < 5, states[:, :-1], 0))
    return chooser.judge(drafts, states).accept_lens


OPTIONS = [{"top_p": 0.9}, {"temperature": 0.8}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.05, "top_p": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_is_that_of_a_piece_on_a_cpu(options: dict[str, Any]) -> None:
    vocab_size = 3000
    head = Head(vocab_size, "cpu")
    torch.manual_seed(0)
    with Peak() as peak:
        lens = choose(head, options, vocab_size, "cpu", "pytorch")
    assert set(range(6, WIDTH)) & set(lens.tolist()), "drafts were accepted, and others rejected"
    assert lens.float().mean() < WIDTH / 2
    assert peak.bytes < BOUND * SAMPLED_ROWS * vocab_size * 4


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "bound"), [("flashinfer", BOUND), ("pytorch", 24)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_is_that_of_a_piece_on_a_gpu(options: dict[str, Any], backend: str, bound: int) -> None:
    """Below 1.25 GB; below 1.87 GB with `--sampling-backend pytorch`, whose sort has a workspace.

    One dense fp32 copy of the logits would take 2.49 GB, and choosing needs some ten.
    """
    vocab_size = 151936
    head = Head(vocab_size, "cuda")
    choose(head, options, vocab_size, "cuda", backend)  # kernels are built, libraries take their workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lens = choose(head, options, vocab_size, "cuda", backend)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{options} {backend}: {peak / 2**20:.0f} MiB")
    assert lens.float().mean() > 1.5
    assert peak < bound * SAMPLED_ROWS * vocab_size * 4
