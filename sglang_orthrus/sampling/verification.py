"""How the tokens of a round are chosen: drafts, then what the autoregressive view makes of them.

Every request chooses as plain SGLang would if it served that request alone: the largest logit, a draw with the noise of
its seed, or a draw at random. The first two are functions of the logits and the position, so a draft counts if the
autoregressive view would have chosen it, too. For the third, drafts are accepted by rejection sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.kernels.ops.sampling import softmax
from sglang.srt.layers.sampler import sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.managers.schedule_batch import ScheduleBatch

from sglang_orthrus.compat.ledger import SHARED_BY_SAMPLERS, depends_on
from sglang_orthrus.sampling.acceptance import Verdict, accept_drafts, leading
from sglang_orthrus.sampling.distributions import (
    Support,
    draw,
    is_accepted,
    joint_support,
    largest,
    residual,
    sequential_support,
    sorted_support,
)
from sglang_orthrus.sampling.logit_adjustments import Adjustments, Place, RowMasks
from sglang_orthrus.sampling.logprobs import RoundLogprobs
from sglang_orthrus.sampling.request_groups import Piece, pieces, rows_index

# Distributions of drafts are kept until they are verified if they are no larger than this (fp32, or fp32 and int64 with
# top-k). A larger one is computed again from the hidden state, and only where a draft was rejected.
KEPT_COLUMNS = 1024
KEPT_ROWS = 128


@dataclass(frozen=True, slots=True)
class Drafts:
    """What a round's block was filled with, and how likely that was.

    Attributes:
        block: [bs, Q] int64, the anchors and the drafts.
        q: [bs, Q-1] fp32, the probability with which each draft was drawn; 1 where it was not drawn at random.
        is_certain: [bs, Q-1] bool, where a token was proposed without drawing lots: q is one-hot there.
        are_drawn: whether any was drawn at random.
        hidden_states: [bs, Q-1, hidden] of the diffusion view, to compute q again.
        supports: the distributions of the rows of some pieces, by the piece's requests.
        candidates: [R, Q-1, K] int64, of the requests that were asked for, their best tokens in every place, best
            first; where a seed acts, its choice is the first.
    """

    block: torch.Tensor
    q: torch.Tensor
    is_certain: torch.Tensor
    are_drawn: bool
    hidden_states: torch.Tensor | None
    supports: dict[tuple[int, ...], Support]
    candidates: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """[bs, Q-1] int64, a view of the block."""
        return self.block[:, 1:]

    def propose_inplace(self, where: Any, tokens: torch.Tensor) -> None:
        """Take other tokens in some places, chosen by a rule (say, by a grammar).

        NOTE: `where` must not depend on what was drawn: a rule that replaces some draws and lets others be would
        need the distribution of the draws that it lets be.

        where: an index into [bs, Q-1], such as the places of some requests, by `rows_index`; tokens: int64, of the
            shape that it selects.
        """
        self.tokens[where] = tokens
        if self.are_drawn:
            self.q[where] = 1.0
            self.is_certain[where] = True


@depends_on(
    "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
    "probs",
    "top_ks",
    "top_ps",
    "min_ps",
    "need_min_p_sampling",
    "sampling_seed",
    "positions",
    what="called for seeded rows with filters",
    why="the same function gives the same tokens",
    until=SHARED_BY_SAMPLERS,
)
@depends_on(
    "sglang.srt.layers.sampler:sampling_from_probs_torch",
    "probs",
    "sampling_seed",
    "positions",
    what="called for seeded rows without filters",
    why="the same function gives the same tokens",
    until=SHARED_BY_SAMPLERS,
)
@depends_on(
    "sglang.kernels.ops.sampling:softmax",
    "logits",
    what="called on rows that are sampled without a seed",
    why="SGLang's sampler uses it there",
    until=SHARED_BY_SAMPLERS,
)
class TokenChoice:
    """Chooses the tokens of one round.

    Args:
        model: an `OrthrusLM`, for its head.
        batch: in a decode round; its `spec_info` is not read.
        anchors: [bs] int64.
        adjustments: what the requests' options do to logits.
        width: Q, tokens verified per request.
        sampling_backend: SGLang's, which decides what filters leave.
    """

    def __init__(
        self,
        model: Any,
        batch: ScheduleBatch,
        anchors: torch.Tensor,
        adjustments: Adjustments,
        width: int,
        sampling_backend: str,
    ) -> None:
        self._model = model
        self._reqs = batch.reqs
        self._info = batch.sampling_info
        self._prefix_lens = batch.seq_lens
        self._anchors = anchors.long()
        self._adjustments = adjustments
        self._width = width
        self._sampling_backend = sampling_backend
        costly = adjustments.requests.union(row for row, req in enumerate(batch.reqs) if req.return_logprob)
        self._pieces = tuple(pieces([req.sampling_params for req in batch.reqs], width, anchors.device, costly))

    def draft(self, hidden_states: torch.Tensor, candidates_of: Sequence[int] = (), num_candidates: int = 1) -> Drafts:
        """Fill the block.

        Args:
            hidden_states: [bs, Q-1, hidden], rows 0..Q-2 of the diffusion view.
            candidates_of: [R] requests for which candidates are wanted, ascending.
            num_candidates: K.
        """
        shape = hidden_states.shape[:2]
        slots = {request: slot for slot, request in enumerate(candidates_of)}
        candidates = self._anchors.new_empty(len(slots), shape[1], num_candidates)
        block = self._anchors.new_empty(shape[0], self._width)
        block[:, 0] = self._anchors
        tokens = block[:, 1:]
        q = torch.ones(shape, device=tokens.device)
        is_certain = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        place = self._draft_place(torch.arange(shape[1], device=tokens.device))
        supports = {}
        are_drawn = is_lost = False
        for piece in self._pieces:
            logits = self._logits(hidden_states, piece, place)
            own = [(number, slots[request]) for number, request in enumerate(piece.requests) if request in slots]
            if own:
                numbers, rows = (rows_index(indices, logits.device) for indices in zip(*own, strict=True))
                candidates[rows] = largest(logits[numbers], num_candidates)
            if piece.way.is_greedy and len(own) == len(piece.requests):
                tokens[piece.index] = candidates[rows, :, 0]
                del logits  # before the next ones are made
                continue
            if self._is_function_of_logits(piece):
                chosen = self._chosen(logits, piece)
                tokens[piece.index] = chosen
                if own:
                    candidates[rows, :, 0] = chosen[numbers]
                del logits
                continue
            are_drawn = True
            support = self._support(self._scaled(logits, piece), piece)
            del logits
            drawn = support.draw()
            tokens[piece.index] = drawn.view(-1, shape[1])
            q[piece.index] = support.probability_of(drawn).view(-1, shape[1])
            is_certain[piece.index] = False
            if support.weights.shape[1] <= KEPT_COLUMNS or tokens.numel() <= KEPT_ROWS:
                supports[piece.requests] = support
            else:
                is_lost = True
            del support, drawn
        # Verify overwrites hidden states where it replays a graph.
        kept = hidden_states.clone() if is_lost else None
        return Drafts(block, q, is_certain, are_drawn, kept, supports, candidates if slots else None)

    @property
    def foreseeable_requests(self) -> frozenset[int]:
        """Requests of which `best_tokens` may be asked: greedy ones, where no custom processor would run twice."""
        return frozenset(
            request
            for piece in self._pieces
            if piece.way.is_greedy and all(self._reqs[other].custom_logit_processor is None for other in piece.requests)
            for request in piece.requests
        )

    def best_tokens(self, drafts: Drafts, hidden_states: torch.Tensor, requests: Collection[int]) -> torch.Tensor:
        """What `judge` would choose after every row of some requests without masks: [bs, Q] int64, 0 of others.

        The head runs over whole pieces, as in `judge`: over other rows its results differ in the last bits.
        """
        best = torch.zeros_like(drafts.block)
        place = self._verify_place(drafts.block)
        for piece in self._pieces:
            if not set(requests).isdisjoint(piece.requests):
                best[piece.index] = self._logits(hidden_states, piece, place).argmax(dim=-1)
        return best

    def judge(
        self,
        drafts: Drafts,
        hidden_states: torch.Tensor,
        masks: RowMasks | None = None,
        logprobs: RoundLogprobs | None = None,
        limits: torch.Tensor | None = None,
    ) -> Verdict:
        """Decide what the round emits.

        Args:
            drafts: the block, and how it came about.
            hidden_states: [bs, Q, hidden] of the autoregressive view.
            masks: what grammars allow after each row.
            logprobs: takes the log probabilities of what is emitted.
            limits: [bs] int64, the most drafts that may be accepted of each request, where masks are missing behind
                them. They must not depend on anything that is drawn at random.
        """
        block = drafts.block
        num_accepted = torch.empty_like(self._anchors)
        bonus = torch.empty_like(self._anchors)
        place = self._verify_place(block)
        if limits is None:
            limits = torch.full_like(self._anchors, block.shape[1] - 1)
        for piece in self._pieces:
            logits = self._logits(hidden_states, piece, place, masks)
            if self._is_function_of_logits(piece):
                predictions = self._chosen(logits, piece)
                accepted = leading(block[piece.index][:, 1:] == predictions[:, :-1]).minimum(limits[piece.index])
                num_accepted[piece.index] = accepted
                bonus[piece.index] = predictions.gather(1, accepted[:, None]).squeeze(1)
            else:
                num_accepted[piece.index], bonus[piece.index] = self._reject(logits, piece, drafts, limits)
            if logprobs is not None and logprobs.wants(piece):
                emitted = block[piece.index].roll(-1, dims=1)
                emitted.scatter_(1, num_accepted[piece.index][:, None], bonus[piece.index][:, None])
                temperatures = None
                if not piece.way.is_greedy:
                    temperatures = self._per_row(self._info.temperatures, piece, emitted.numel())
                logprobs.add(piece, logits.flatten(0, 1), temperatures, emitted)
            del logits  # before the next ones are made
        return accept_drafts(block, num_accepted, bonus, self._prefix_lens)

    def _reject(
        self, logits: torch.Tensor, piece: Piece, drafts: Drafts, limits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rejection sampling over a piece's rows: accepted drafts and the token after them, both [r]."""
        requests, width, vocab_size = logits.shape
        p = self._support(self._scaled(logits, piece), piece)
        p_of_draft = p.probability_of(drafts.block[piece.index].roll(-1, dims=1).flatten()).view(requests, width)[
            :, :-1
        ]
        accepted = leading(is_accepted(p_of_draft, drafts.q[piece.index], torch.rand_like(p_of_draft)))
        # The draft behind the limit does not count, whatever its coin: the token there is drawn from p.
        limit = limits[piece.index]
        accepted = accepted.minimum(limit)
        first = torch.arange(requests, device=logits.device)
        p_after = p.at(first * width + accepted).probabilities(vocab_size)
        q_after = torch.where((accepted < limit)[:, None], self._q_after(piece, drafts, accepted, vocab_size), 0)
        return accepted, draw(residual(p_after, q_after))

    def _q_after(self, piece: Piece, drafts: Drafts, accepted: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """The distribution of every request's first rejected draft, if there is one. accepted: [r] -> [r, V]"""
        num_drafts = drafts.tokens.shape[1]
        row = accepted.clamp(max=num_drafts - 1)[:, None]
        support = drafts.supports.get(piece.requests)
        if support is not None:
            first = torch.arange(row.shape[0], device=row.device)
            q = support.at(first * num_drafts + row.squeeze(1)).probabilities(vocab_size)
        else:
            assert drafts.hidden_states is not None, "kept whenever a distribution was not"
            states = drafts.hidden_states[piece.index]
            states = states.gather(1, row[:, :, None].expand(-1, -1, states.shape[2]))
            logits = self._model.logits(states).unflatten(0, (-1, 1))
            offsets = self._anchors.new_zeros(self._anchors.shape[0], 1)
            offsets[piece.index] = row
            self._adjustments.apply_inplace(logits, piece, self._draft_place(offsets))
            q = self._support(self._scaled(logits, piece), piece).probabilities(vocab_size)
        is_certain = drafts.is_certain[piece.index].gather(1, row)
        one_hot = torch.zeros_like(q).scatter_(1, drafts.tokens[piece.index].gather(1, row), 1.0)
        return torch.where(is_certain, one_hot, q)

    def _verify_place(self, block: torch.Tensor) -> Place:
        """A verify row knows the block up to its own token. block: [bs, Q]"""
        offsets = torch.arange(self._width, device=block.device)
        host = block.tolist() if self._adjustments.read_outputs else None
        return Place(block, offsets[:, None] >= offsets, offsets, host)

    def _draft_place(self, offsets: torch.Tensor) -> Place:
        """All that a draft row knows of the block is the anchor. offsets: [W] or [bs, W]."""
        width = offsets.shape[-1]
        sees = torch.ones(width, 1, dtype=torch.bool, device=offsets.device)
        host = self._anchors[:, None].tolist() if self._adjustments.read_outputs else None
        return Place(self._anchors[:, None], sees, offsets, host)

    def _logits(
        self, hidden_states: torch.Tensor, piece: Piece, place: Place, masks: RowMasks | None = None
    ) -> torch.Tensor:
        """[r, W, V], adjusted; fp32 where there is arithmetic with it."""
        states = hidden_states[piece.index]
        # On a CPU XGrammar masks fp32 alone.
        in_fp32 = not piece.way.is_greedy or piece.is_costly or (masks is not None and states.is_cpu)
        logits: torch.Tensor = self._model.logits(states, in_fp32=in_fp32).unflatten(0, states.shape[:2])
        self._adjustments.apply_inplace(logits, piece, place, masks)
        return logits

    def _is_function_of_logits(self, piece: Piece) -> bool:
        return piece.way.is_greedy or self._info.sampling_seed is not None

    def _chosen(self, logits: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Greedy and seeded choices: [r, W, V] -> [r, W] int64."""
        if piece.way.is_greedy:
            return logits.argmax(dim=-1)
        positions = self._prefix_lens[piece.index][:, None] + torch.arange(logits.shape[1], device=logits.device)
        # A seed acts on the very function that plain SGLang takes, with its deterministic softmax.
        probs = torch.softmax(self._scaled(logits, piece), dim=-1)
        seeds = self._per_row(self._info.sampling_seed, piece, probs.shape[0])
        if piece.way.is_filtered:
            top_ks, top_ps, min_ps = self._filters(piece, probs.shape[0])
            tokens = top_k_top_p_min_p_sampling_from_probs_torch(
                probs, top_ks, top_ps, min_ps, False, seeds, positions.flatten()
            )
        else:
            tokens = sampling_from_probs_torch(probs, seeds, positions.flatten())
        return tokens.long().view(logits.shape[:2])

    def _scaled(self, logits: torch.Tensor, piece: Piece) -> torch.Tensor:
        """[r, W, V] -> [r * W, V], divided by temperatures."""
        rows = logits.flatten(0, 1)
        return rows / self._per_row(self._info.temperatures, piece, rows.shape[0])

    def _support(self, scaled: torch.Tensor, piece: Piece) -> Support:
        """What rows choose from: [r * W, V] scaled logits -> [r * W, K]."""
        probs = softmax(scaled)
        if not piece.way.is_filtered:
            return Support(probs)
        top_ks, top_ps, min_ps = self._filters(piece, scaled.shape[0])
        if self._sampling_backend == "pytorch":
            return sorted_support(probs, top_ks, top_ps, min_ps, piece.max_top_k)
        from sglang.srt.layers.sampler import top_k_renorm_prob, top_p_renorm_prob

        if piece.way.has_min_p:
            return sequential_support(probs, top_ks, top_ps, min_ps, top_k_renorm_prob, top_p_renorm_prob)
        return joint_support(probs, top_ks, top_ps, top_k_renorm_prob, top_p_renorm_prob)

    def _filters(self, piece: Piece, num_rows: int) -> list[torch.Tensor]:
        """top_ks, top_ps and min_ps, [r * W] each."""
        return [self._per_row(x, piece, num_rows) for x in (self._info.top_ks, self._info.top_ps, self._info.min_ps)]

    def _per_row(self, parameter: torch.Tensor, piece: Piece, num_rows: int) -> torch.Tensor:
        """A parameter of requests, [bs, ...] -> [r * W, ...]."""
        width = num_rows // len(piece.requests)
        return parameter[piece.index].repeat_interleave(width, dim=0, output_size=num_rows)
