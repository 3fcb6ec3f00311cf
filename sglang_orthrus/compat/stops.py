"""Where an answer ends: at the first stop among the tokens of a round, as if they had come one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.wrapping import wrap_once

_ONE_TOKEN = "called for one token at a time"
_ORDER_OF_CHECKS = "update_finish_state checks strings before tokens, and strings in the order of the request"
_FIRST_STOP_WINS = "SGLang ends a text at the first stop of several (patches/0002)"


@depends_on(
    "sglang.srt.managers.schedule_batch:Req.update_finish_state",
    "new_accepted_len",
    what="wrapped: stops are looked for token by token",
    why="of several stops in one round SGLang takes a string before a token, and the string that is listed first; "
    "in the last round of an aborted request it looks for none",
    until=_FIRST_STOP_WINS,
)
def stop_at_first_match() -> None:
    """End a text at the first stop of a round."""
    from sglang.srt.managers.schedule_batch import Req

    def one_by_one(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def update_finish_state(self: Any, new_accepted_len: int = 1) -> None:
            if new_accepted_len == 1 and not self.to_finish:
                # Of one token SGLang finds the first stop, too. Most requests of a large batch come here.
                stock(self, 1)
                if self.finished_len is not None:
                    _cut_reasoning_tokens(self)
                return
            wanted = self.sampling_params
            aborted = self.to_finish
            is_error = getattr(aborted, "status_code", None) is not None  # ends a text wherever it is
            has_strings = bool(wanted.stop_strs or wanted.stop_regex_strs)
            # Of an aborted request SGLang appends all tokens of the round, also those behind a stop.
            if not self.finished() and not is_error and (aborted or (new_accepted_len > 1 and has_strings)):
                self.to_finish = None
                _look_for_stops(self, new_accepted_len)
                self.to_finish = None if self.finished() else aborted
            stock(self, new_accepted_len)
            if self.finished() and self.finished_len is None and len(self.output_ids) > wanted.max_new_tokens:
                self.finished_len = wanted.max_new_tokens  # aborted in a round that runs past the limit
            _cut_reasoning_tokens(self)

        return update_finish_state

    wrap_once(Req, "update_finish_state", one_by_one)


@depends_on(
    "sglang.srt.managers.schedule_batch:Req._check_str_based_finish",
    "new_accepted_len",
    what=_ONE_TOKEN,
    why=_ORDER_OF_CHECKS,
    until=_FIRST_STOP_WINS,
)
@depends_on(
    "sglang.srt.managers.schedule_batch:Req._check_token_based_finish",
    "new_accepted_tokens",
    what=_ONE_TOKEN,
    why=_ORDER_OF_CHECKS,
    until=_FIRST_STOP_WINS,
)
@depends_on(
    "sglang.srt.managers.schedule_batch:Req._cap_finished_len_at_max_new_tokens",
    what="called after a stop was found",
    why="update_finish_state does so after its own checks",
    until=_FIRST_STOP_WINS,
)
def _look_for_stops(req: Any, new_accepted_len: int) -> None:
    """Finish the request at the first of its last tokens that completes a stop; leave the rest to SGLang if none."""
    run = req.output_ids[-new_accepted_len:]
    del req.output_ids[-new_accepted_len:]
    for position, token in enumerate(run, start=1):
        req.output_ids.append(token)
        if req._check_str_based_finish(1) or req._check_token_based_finish([token]):
            req.finished_len = len(req.output_ids)
            req.output_ids.extend(run[position:])
            req._cap_finished_len_at_max_new_tokens()
            return


@depends_on(
    "sglang.srt.managers.schedule_batch:Req._check_token_based_finish",
    what="known to look for stop_token_ids, eos_token_ids and the tokenizer's, unless ignore_eos is set",
    why="it writes down what it finds, before the scheduler takes in a result",
    until="never: it is our own question",
)
def ends_with(req: Any, tokens: Sequence[int]) -> bool:
    """Whether a text surely ends with what a round has committed, and no text has taken in yet.

    It may still end where this says no: stop strings and grammars are left out.
    """
    wanted, tokenizer = req.sampling_params, req.tokenizer
    if req.to_finish or len(req.output_ids) + len(tokens) >= wanted.max_new_tokens:
        return True
    if wanted.ignore_eos:
        return False
    stops = [wanted.stop_token_ids, req.eos_token_ids]
    if tokenizer is not None:
        stops += [(tokenizer.eos_token_id,), tokenizer.additional_stop_token_ids]
    return any(own and not set(own).isdisjoint(tokens) for own in stops)


@depends_on(
    "sglang.srt.managers.schedule_batch:Req.update_reasoning_tokens",
    "token_id",
    "think_end_ids",
    what="its count is cut once the request has finished",
    why="it counts a whole round before a stop is looked for in it",
    until="SGLang counts up to the end of the text (patches/0016)",
)
def _cut_reasoning_tokens(req: Any) -> None:
    """Take reasoning tokens past the text's end back; reasoning is what the output begins with."""
    if req.finished_len is not None:
        req.reasoning_tokens = min(req.reasoning_tokens, req.finished_len)


@depends_on(
    "sglang.srt.session.session_controller:Session._concat_token_arrays",
    "last_req",
    "req",
    "session_params",
    what="wrapped: a session's next turn goes on from the end of the former answer",
    why="it takes all committed tokens, also those behind a stop in the same round",
    until="SGLang trims them, as it does in streaming sessions (patches/0003)",
)
def continue_sessions_at_the_end() -> None:
    """Build a session's next prompt on the former answer, without what its last round committed past the end."""
    from sglang.srt.session.session_controller import Session

    def trimmed(stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def concat_token_arrays(last_req: Any, *args: Any, **kwargs: Any) -> Any:
            committed = last_req.output_ids
            last_req.output_ids = committed[: last_req.finished_len]
            try:
                return stock(last_req, *args, **kwargs)
            finally:
                last_req.output_ids = committed

        return concat_token_arrays

    wrap_once(Session, "_concat_token_arrays", trimmed, staticmethod)
