"""Where requests' numbers are checked, and what their options leave to choose from: changes to SGLang at run time."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import wraps
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException

from sglang_orthrus.compat.ledger import Touch
from sglang_orthrus.compat.scheduler import _wrap_once

REQUEST_LEDGER: tuple[Touch, ...] = (
    Touch(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
        ("obj", "request"),
        "wrapped, so that a ValueError of a request is a 400 in every interface",
        "Ollama's and Vertex AI's do not catch it and answer 500",
        "SGLang's interfaces catch it alike",
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
        ("obj",),
        "wrapped, so that a request with a number that may not become an index, a size or a logit gets a 400",
        "the scheduler dies of them, and not all requests that it prefills have passed its own validation "
        "(patches/0009 to 0012)",
        "SGLang checks them",
    ),
    Touch(
        "sglang.srt.managers.io_struct:msgpack_encode",
        ("obj",),
        "called on a request without its long fields",
        "a field of another type than the scheduler expects ends the scheduler (patches/0014)",
        "SGLang answers 400 to them",
    ),
    Touch(
        "sglang.srt.managers.utils:msgpack_decode_explained",
        ("data",),
        "called on the result",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.managers.schedule_batch:Req.set_finish_with_abort",
        ("error_msg",),
        "wrapped, so that the custom logit processor of an aborted request does not run",
        "sessions abort some requests before anybody has tried their processor",
        "SGLang drops it, as it drops the grammar",
    ),
    Touch(
        "sglang.srt.sampling.custom_logit_processor:CustomLogitProcessor.from_str",
        ("json_str",),
        "called in the scheduler, to try a request's processor before it joins a batch",
        "a processor that can't be loaded or fails on its parameters ends the scheduler",
        "SGLang answers 400 to it",
    ),
    Touch(
        "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.apply_logits_bias",
        ("logits",),
        "wrapped, so that the sampler knows what the grammar alone allows",
        "where options forbid all of it SGLang samples from nothing: its scheduler dies (patches/0013)",
        "options give way to the grammar in SGLang",
    ),
)


class BadRequest(ValueError, HTTPException):
    """What SGLang's interfaces answer 400 to, and the web framework where an interface does not catch ValueErrors."""

    def __init__(self, problem: str) -> None:
        HTTPException.__init__(self, HTTPStatus.BAD_REQUEST, problem)

    def __str__(self) -> str:
        return self.detail


def refuse_numbers() -> None:
    """Answer 400 to requests with numbers that the scheduler could not use.

    Must run in the process that answers HTTP; a second call changes nothing.
    """
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from sglang_orthrus.server_args.admission import raw_problem, tokenized_problem, unreadable

    def checked(stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def create_tokenized_object(self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            _raise(raw_problem(obj))
            try:
                tokenized = stock(self, obj, *args, **kwargs)
            except (TypeError, OverflowError, re.error) as error:
                # An unknown field of session_params, an id beyond 64 bits, a stop_regex that is none.
                raise ValueError(f"{type(error).__name__}: {error}") from error
            # Types first: checks of values compare numbers.
            _raise(unreadable(tokenized))
            _raise(tokenized_problem(tokenized, self.model_config.vocab_size, self.model_config.hidden_size))
            return tokenized

        return create_tokenized_object

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

    _wrap_once(TokenizerManager, "_create_tokenized_object", checked)
    _wrap_once(TokenizerManager, "generate_request", answered)


def keep_allowed_logits() -> None:
    """Have options that may forbid tokens leave, as `allowed_logits`, what the grammar alone allows.

    `FirstTokenSampler` takes it. Must run in the scheduler process; a second call changes nothing.
    """
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    def keeping(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def apply_logits_bias(self: Any, logits: Any) -> None:
            orchestrator = self.penalizer_orchestrator
            may_forbid = (
                self.has_custom_logit_processor
                or self.logit_bias is not None
                or self.acc_additive_penalties is not None
                or (orchestrator is not None and orchestrator.is_required)
            )
            allowed = logits.clone() if may_forbid else None
            stock(self, logits)
            if allowed is not None and self.grammar_mask is not None:
                self.grammar_mask.apply(allowed)
            self.allowed_logits = allowed

        return apply_logits_bias

    _wrap_once(SamplingBatchInfo, "apply_logits_bias", keeping)


def forget_processors_of_aborted() -> None:
    """Do without the custom logit processor of a request that SGLang has aborted but will still prefill, in one token.

    Must run in the scheduler process; a second call changes nothing.
    """
    from sglang.srt.managers.schedule_batch import Req

    def forgetting(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def set_finish_with_abort(self: Any, *args: Any, **kwargs: Any) -> None:
            stock(self, *args, **kwargs)
            self.custom_logit_processor = None

        return set_finish_with_abort

    _wrap_once(Req, "set_finish_with_abort", forgetting)


def _raise(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)
