"""What two ranks agree on, in two processes of gloo."""

from __future__ import annotations

import multiprocessing
import socket
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.load.simulate import measured_costs
from sglang_orthrus import ranks
from sglang_orthrus.compat.grammars import fail_only_if_told
from sglang_orthrus.grammar.across_ranks import _fail_together
from sglang_orthrus.models.orthrus import _best_of_all
from sglang_orthrus.round.policy import Policy
from sglang_orthrus.round.width_controller import WidthController
from tests.unit.test_grammar_cursors import ENCODE, limited_grammar
from tests.unit.test_grammar_cursors import VOCABULARY as VOCABULARY_SIZE
from tests.unit.test_policy import Request, batch_of

SHARE, ROWS = 8, 64
VOCABULARY = 13  # the last share is not full


class Group:
    """As much of SGLang's `GroupCoordinator` as is asked for."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank_in_group, self.world_size, self.ranks = rank, size, list(range(size))
        self.cpu_group = dist.group.WORLD

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        dist.broadcast(tensor, src)
        return tensor

    def _all_gather_into_tensor(self, output: torch.Tensor, own: torch.Tensor) -> None:
        dist.all_gather_into_tensor(output, own)


def _logits() -> torch.Tensor:
    """Whole numbers, so that there are ties, of which the first counts; the last row is all one number."""
    logits = torch.randint(0, 4, (ROWS, VOCABULARY), generator=torch.Generator().manual_seed(3)).float()
    logits[-1] = 1.0
    return logits


def _widths() -> list[int]:
    """Of rounds that commit ever fewer tokens; rank 0's controller alone learns of it."""
    controller = WidthController(measured_costs()) if ranks.is_first() else None
    policy, request = Policy((1, 8, 16, 32), controller, is_shared=True), Request("a")
    batch = batch_of(request)
    widths = []
    for number in range(60):
        policy.note_prefill()  # so that these rounds are not timed
        widths.append(policy.plan(batch, can_defer=True).width)
        tokens = min(widths[-1], 32 // min(number + 1, 32))
        policy.observe([tokens - 1])
        request.take(tokens)
    return widths


def _refusals() -> list[bool]:
    """Whether a grammar refuses each of some tokens that it allows: on rank 0 it has come to a limit of its engine."""
    own = limited_grammar(100)
    if ranks.is_first():
        # It walks along drafts and fills masks.
        with suppress(ValueError):
            own.fill_vocab_mask(own.allocate_vocab_mask(VOCABULARY_SIZE, 1, "cpu"), 0)
    reqs = [SimpleNamespace(grammar=own), SimpleNamespace(grammar=limited_grammar(250_000))]
    fail_only_if_told()
    refused = []
    for number in range(3):
        if number == 2:
            _fail_together(reqs, [0, 1])
        for req in reqs:
            refused.append(True)
            with suppress(ValueError):
                req.grammar.accept_token(ENCODE("a")[0])
                refused[-1] = False
    return refused


def _run(rank: int, port: int, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ranks.use_group(Group(rank, 2))
    first = ranks.offset(SHARE)
    own = _logits()[:, first : first + SHARE]
    answers.put(
        SimpleNamespace(
            rank=rank,
            best=_best_of_all(own.clone(), first).tolist(),
            empty=_best_of_all(own[:, : SHARE if rank == 0 else 0].clone(), first).tolist(),
            tensor=ranks.from_first(torch.tensor([rank + 5])).tolist(),
            numbers=ranks.numbers_from_first([rank, 7 * rank + 1]),
            widths=_widths(),
            refusals=_refusals(),
            gathered=ranks.gathered(torch.tensor([rank, 10 + rank])).tolist(),
            are_several=ranks.are_several(),
            is_first=ranks.is_first(),
        )
    )
    answers.close()
    answers.join_thread()


def test_two_ranks_agree() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_run, args=(rank, port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted((answers.get(timeout=60) for _ in processes), key=lambda answer: answer.rank)
    for process in processes:
        process.join(60)
    logits = _logits()
    for answer in found:
        assert answer.best == logits.argmax(dim=-1).tolist()
        assert answer.empty == logits[:, :SHARE].argmax(dim=-1).tolist(), "a rank without a share of the vocabulary"
        assert answer.tensor == [5] and answer.numbers == [0, 1]
        assert answer.gathered == [[0, 10], [1, 11]]
        assert answer.are_several
        assert answer.refusals == [False, False, False, False, True, False], "one rank alone would abort a request"
    assert [answer.is_first for answer in found] == [True, False]
    assert found[0].widths == found[1].widths
    assert found[0].widths[0] == 32 and found[0].widths[-1] == 1, "they follow what rank 0 has learnt"


def test_one_rank_is_left_alone() -> None:
    ranks.use_group(SimpleNamespace(world_size=1))
    tensor = torch.tensor([3])
    assert not ranks.are_several() and ranks.is_first() and ranks.offset(100) == 0
    assert ranks.from_first(tensor) is tensor and ranks.numbers_from_first([1, 2]) == [1, 2]
    assert ranks.gathered(tensor).tolist() == [[3]]
