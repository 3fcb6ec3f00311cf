"""Requests: what is wrong with one is a 400 in every interface, and never reaches the scheduler.

Updates of weights are requests, too: the scheduler gets one at a time.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import wraps
from http import HTTPStatus
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.wrapping import wrap_once


class RequestChecks(NamedTuple):
    """What may be wrong with a request, in the order in which it is asked. Each returns a sentence, or None.

    Attributes:
        samples: given how many prompts a request has, and `n`.
        raw: given SGLang's request as it came.
        types: given the tokenized request; what the scheduler can decode.
        values: given the tokenized request, and the model's vocabulary size, hidden size and context length.
    """

    samples: Callable[[int, int], str | None]
    raw: Callable[[Any], str | None]
    types: Callable[[Any], str | None]
    values: Callable[[Any, int, int, int], str | None]


class BadRequest(ValueError, HTTPException):
    """What SGLang's interfaces answer 400 to, and the web framework where an interface does not catch ValueErrors."""

    def __init__(self, problem: str) -> None:
        HTTPException.__init__(self, HTTPStatus.BAD_REQUEST, problem)

    def __str__(self) -> str:
        return self.detail


@depends_on(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
    "obj",
    what="wrapped: a request with a number that cannot become an index, a size or a logit gets a 400",
    why="such numbers end the scheduler, and not every request that it prefills has passed its own validation",
    until="SGLang checks them (patches/0009 to 0012, 0014)",
)
def check_requests(checks: RequestChecks) -> None:
    """Answer 400 to requests that the scheduler could not use."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    def checked(stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def create_tokenized_object(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            _raise(checks.raw(obj))
            try:
                tokenized = stock(self, obj, *args, **kwargs)
            except (TypeError, OverflowError, re.error) as error:
                # An unknown field of session_params, an id beyond 64 bits, a stop_regex that is none.
                raise ValueError(f"{type(error).__name__}: {error}") from error
            # Types first: checks of values compare numbers.
            _raise(checks.types(tokenized))
            model = self.model_config
            _raise(checks.values(tokenized, model.vocab_size, model.hidden_size, model.context_len))
            return tokenized

        return create_tokenized_object

    wrap_once(TokenizerManager, "_create_tokenized_object", checked)
    _check_samples(checks.samples)


@depends_on(
    "sglang.srt.managers.io_struct:GenerateReqInput._handle_parallel_sampling",
    what="wrapped: a request for too many texts gets a 400",
    why="the process that answers HTTP copies a request n times before anything else is checked",
    until="SGLang bounds n (patches/0024)",
)
def _check_samples(problem: Callable[[int, int], str | None]) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    def checked(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def handle_parallel_sampling(self: Any) -> None:
            stock(self)
            _raise(problem(self.batch_size, self.parallel_sample_num))

        return handle_parallel_sampling

    wrap_once(GenerateReqInput, "_handle_parallel_sampling", checked)


@depends_on(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
    "obj",
    "request",
    what="wrapped: a ValueError becomes a 400 in every interface",
    why="the interfaces of Ollama and Vertex AI do not catch it and answer 500",
    until="SGLang's interfaces catch it alike",
)
def answer_value_errors_with_400() -> None:
    """Have every interface answer 400 to what is wrong with a request."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    def answered(stock: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncGenerator[Any]]:
        @wraps(stock)
        async def generate_request(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
            try:
                async with aclosing(stock(self, *args, **kwargs)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except ValueError as error:
                raise BadRequest(str(error)) from error

        return generate_request

    wrap_once(TokenizerManager, "generate_request", answered)


@depends_on(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._wait_for_model_update_from_disk",
    "obj",
    what="wrapped: updates of weights from disk wait for each other",
    why="two at once share one future while the engine is paused, and the second answer ends the server",
    until="SGLang keeps them apart (patches/0018)",
)
def update_weights_one_at_a_time() -> None:
    """Send an update of weights from disk to the scheduler once the one before is answered."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    def queued(stock: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @wraps(stock)
        async def wait_for_model_update_from_disk(self: Any, *args: Any, **kwargs: Any) -> Any:
            async with self.__dict__.setdefault("_orthrus_update_lock", asyncio.Lock()):
                return await stock(self, *args, **kwargs)

        return wait_for_model_update_from_disk

    wrap_once(TokenizerManager, "_wait_for_model_update_from_disk", queued)


@depends_on(
    "sglang.srt.managers.schedule_batch:Req.set_finish_with_abort",
    "error_msg",
    what="wrapped: the custom logit processor of an aborted request does not run",
    why="SGLang still prefills such a request, and sessions abort some before anybody has tried their processor",
    until="SGLang drops the processor, as it drops the grammar",
)
def drop_processors_of_aborted() -> None:
    """Drop the custom logit processor of a request that SGLang has aborted but will still prefill."""
    from sglang.srt.managers.schedule_batch import Req

    def dropping(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def set_finish_with_abort(self: Any, *args: Any, **kwargs: Any) -> None:
            stock(self, *args, **kwargs)
            self.custom_logit_processor = None

        return set_finish_with_abort

    wrap_once(Req, "set_finish_with_abort", dropping)


def _raise(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)
