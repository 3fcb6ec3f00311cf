"""Every dependence on SGLang's internals, and the few places where SGLang is changed at run time.

Nothing here runs unless an ORTHRUS server is started, except `qwen3_attention_class` (loading an Orthrus model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from typing import Any

from sglang_orthrus.compat.ledger import Touch
from sglang_orthrus.compat.reasoning_counts import cut_reasoning

SUPPORTED_SGLANG = "0.5.23"

LEDGER: tuple[Touch, ...] = (
    Touch(
        "sglang.srt.mem_cache.kv_cache_configurator:get_req_to_token_extra_context_len",
        (),
        "wrapped, so that a row of req_to_token has room for two blocks past the context length",
        "the decode reservation is two blocks, the built-in headroom one block and four columns",
        "SGLang sizes the headroom from get_alloc_reserve_per_decode() for every algorithm",
    ),
    Touch(
        "sglang.srt.managers.scheduler:Scheduler.validate_dllm_request",
        ("req",),
        "wrapped, so that requests with options that are not exact yet get a 400",
        "request admission is keyed on the built-in algorithms' names",
        "CustomSpecAlgo has a request-validation hook",
    ),
    Touch(
        "sglang.srt.managers.scheduler:Scheduler.launch_batch_sample_if_needed",
        ("batch_result", "cur_batch"),
        "wrapped, so that the fence of a step comes behind its delayed part, too",
        "SGLang delays only sampling; with grammars a round delays its verify pass, so that the former round's result "
        "is taken in while it drafts",
        "the scheduler takes results in before it calls a worker's grammar barrier",
    ),
    Touch(
        "sglang.srt.managers.scheduler:Scheduler._apply_war_barrier",
        (),
        "called after that",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_disk",
        ("model_path",),
        "wrapped, so that a checkpoint without the diffusion view gets a 400",
        "when loading fails, SGLang rolls back to the folder that has just failed, and the scheduler dies",
        "the rollback uses the former folder",
    ),
    Touch(
        "sglang.srt.managers.schedule_batch:Req.update_finish_state",
        ("new_accepted_len",),
        "wrapped, so that stops are looked for token by token, and reasoning is counted up to where the text stops "
        "(`token_counts`)",
        "of several stops in one round the built-in check takes a string before a token and the string listed first, "
        "not the one that ends the text first (patches/0002)",
        "SGLang takes the first",
    ),
    Touch(
        "sglang.srt.managers.schedule_batch:Req._check_str_based_finish",
        ("new_accepted_len",),
        "called for one token",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.managers.schedule_batch:Req._check_token_based_finish",
        ("new_accepted_tokens",),
        "called for one token",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.managers.schedule_batch:Req._cap_finished_len_at_max_new_tokens",
        (),
        "called after a stop was found",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.session.session_controller:Session._concat_token_arrays",
        ("last_req", "req", "session_params"),
        "wrapped, so that a session's next turn goes on from the former answer's end",
        "it takes all committed tokens, also those past a stop in the same round (patches/0003)",
        "SGLang trims them, as it does in streaming sessions",
    ),
    Touch(
        "sglang.srt.models.qwen3:Qwen3Attention",
        ("hidden_size", "num_heads", "num_kv_heads", "layer_id", "prefix"),
        "replaced while an Orthrus model is constructed",
        "Qwen3DecoderLayer takes the class from its module",
        "Qwen3DecoderLayer accepts an attention class",
    ),
    Touch(
        "sglang.srt.models.qwen3:Qwen3Attention.forward",
        ("positions", "hidden_states", "forward_batch"),
        "its steps are taken one by one for blocks on a GPU, norm, RoPE and the store of K and V in one kernel",
        "they are four kernels per layer and pass",
        "Qwen3 fuses them on CUDA as it does on ROCm",
    ),
    Touch(
        "sglang.srt.model_executor.forward_context:get_token_to_kv_pool",
        (),
        "called, for the buffers that this kernel stores to",
        "as Qwen3's fused path on ROCm does",
        "Qwen3 fuses them on CUDA",
    ),
    Touch(
        "sglang.srt.managers.overlap_utils:FutureMap",
        ("device", "spec_algo", "req_to_token_pool", "needs_cpu_seq_lens", "needs_confidence_relay"),
        "constructed",
        "CustomSpecAlgo lacks create_future_map (patches/0001)",
        "CustomSpecAlgo has create_future_map",
    ),
    Touch(
        "sglang.srt.speculative.spec_registry:CustomSpecAlgo",
        ("name", "factory", "supports_overlap", "validate_server_args"),
        "subclassed",
        "the documented spec_class argument expects a subclass, but the module is private",
        "never: it is the seam",
    ),
    Touch(
        "sglang.srt.speculative.base_spec_worker:BaseSpecWorker",
        (),
        "subclassed",
        "the scheduler expects its interface of every worker",
        "never: it is the seam",
    ),
    Touch(
        "sglang.srt.speculative.dflash_info:DFlashVerifyInput",
        ("draft_token", "positions", "draft_token_num", "capture_hidden_mode"),
        "subclassed as the inputs of both passes",
        "attention backends and planners dispatch on its spec_input_type, an enum closed to plugins",
        "SpecInputType is open, or backends dispatch on behaviour",
    ),
    Touch(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        ("batch", "model_runner", "return_hidden_states_before_norm"),
        "called for every pass",
        "there is no public way to run one more forward over a batch",
        "never: speculative workers share it",
    ),
    Touch(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.mark_forward_metadata_ready",
        (),
        "called for a verify pass whose graph replays on the draft's plan",
        "as the DFLASH worker does",
        "never: speculative workers share it",
    ),
    Touch(
        "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
        ("batch", "forward_batch", "is_verify"),
        "called for prefill and for both passes",
        "as above",
        "never: speculative workers share it",
    ),
    Touch(
        "sglang.srt.managers.utils:GenerationBatchResult",
        (
            "logits_output",
            "next_token_ids",
            "accept_lens",
            "next_draft_input",
            "new_seq_lens",
            "can_run_cuda_graph",
            "speculative_num_draft_tokens",
            "delay_sample_func",
        ),
        "returned from every round",
        "it is the spec-V2 result",
        "never: it is the seam",
    ),
    Touch(
        "sglang.srt.constrained.xgrammar_backend:XGrammarGrammar",
        ("matcher",),
        "its matcher is walked along a block and back",
        "SGLang's grammar objects have no call that fills the masks of a chain",
        "they have one",
    ),
    Touch(
        "xgrammar.base:XGRObject._handle",
        (),
        "read, to call XGrammar's native methods of a matcher",
        "its Python methods let go of the interpreter's lock at every token, so that other threads delay a walk by "
        "milliseconds, and take half as long again",
        "XGrammar walks along a chain of tokens in one call, without masks",
    ),
    Touch(
        "xgrammar.base:_core.GrammarMatcher.__tvm_ffi_type_info__",
        (),
        "searched for these methods",
        "as above",
        "as above",
    ),
    Touch(
        "tvm_ffi.core:Function.release_gil",
        (),
        "set to False for them",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.constrained.llguidance_backend:GuidanceBackend",
        ("tokenizer", "n_vocab"),
        "gets the three functions that ReasonerGrammarBackend asks of a backend, where it lacks them",
        "without them every request with a grammar gets a 400 if there is a reasoning parser (patches/0008)",
        "it has them (sgl-project/sglang#33061)",
    ),
    Touch(
        "sglang.srt.constrained.llguidance_backend:GuidanceGrammar.fill_vocab_mask",
        ("vocab_mask", "idx"),
        "wrapped, so that a grammar that failed on a token fills no mask",
        "behind a reasoning it raises in the scheduler, before its request is gone (patches/0008)",
        "it checks for itself",
    ),
    Touch(
        "sglang.srt.constrained.llguidance_backend:GuidanceGrammar",
        ("ll_matcher",),
        "as above",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.constrained.llguidance_backend:fill_token_bitmask_with_draft_tokens",
        ("entries", "vocab_mask"),
        "fills the masks of a chain",
        "it is SGLang's own call for drafts, but no method of the grammar object",
        "as above",
    ),
    Touch(
        "sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarObject",
        ("grammar", "think_end_ids"),
        "unwrapped past the end of the reasoning, else walked token by token",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarObject._is_generation",
        (),
        "called to see whether the grammar constrains yet",
        "there is no public question",
        "there is one",
    ),
    Touch(
        "sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarObject._is_thinking",
        (),
        "as above",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarObject._grammar_active",
        (),
        "as above",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner",
        ("model_runner", "attn_backend", "speculative_num_draft_tokens"),
        "subclassed; capture, capture_one_shape, get_spec_info, can_run_graph, _resolve_lora_variant and "
        "_next_token_logits_buffer_capacity_rows are overridden",
        "it has no spec input for custom algorithms, and one graph per batch size",
        "it asks the algorithm for spec inputs and graph variants",
    ),
    Touch(
        "sglang.srt.model_executor.model_runner:ModelRunner._decode_cuda_graph_runner_cls",
        (),
        "replaced on the instance",
        "the class of the graph runner is chosen by the built-in algorithms' names",
        "the algorithm names its graph runner",
    ),
    Touch(
        "sglang.srt.model_executor.model_runner:ModelRunner.max_shared_logits_buffer_rows",
        (),
        "replaced on the instance",
        "SGLang allocates fp32 logits for every token of every block, which nobody would write to",
        "the graph runner is asked",
    ),
    Touch(
        "sglang.srt.model_executor.model_runner:ModelRunner._get_attention_backend",
        ("init_new_workspace",),
        "called for a second backend if drafts are wider than verify",
        "an attention backend's graphs have one width (as the UNO worker does)",
        "never: speculative workers share it",
    ),
    Touch(
        "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend._prepare_cuda_graph_metadata",
        ("bs", "num_tokens", "forward_mode", "spec_info"),
        "replaced on the instance, so that the graphs of a batch size share wrappers",
        "a second capture takes the first one's plan away",
        "wrappers are kept per graph",
    ),
    Touch(
        "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.init_cuda_graph_state",
        ("max_bs", "max_num_tokens", "kv_indices_buf"),
        "replaced on the instance, so that it allocates indices per request and no mask",
        "it allocates a context's worth of indices and mask for every token of every block",
        "SGLang sizes them by request",
    ),
    Touch(
        "sglang.srt.layers.attention.flashinfer_backend:PrefillMetadata",
        ("prefill_wrappers", "use_ragged", "extend_no_prefix"),
        "constructed for wrappers that are used again",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.layers.logits_processor:LogitsMetadata",
        ("forward_mode",),
        "constructed to call the head on chosen rows",
        "the head is called inside the forward pass, on all rows",
        "the model has a public head",
    ),
    Touch(
        "sglang.srt.arg_groups.model_override_base:model_config_of",
        ("server_args",),
        "reads the checkpoint's configuration while arguments are resolved",
        "the validation hook gets the arguments alone",
        "never: read-only",
    ),
    Touch(
        "sglang.srt.arg_groups.model_override_base:attention_backends_of",
        ("cfg",),
        "reads the resolved attention backends",
        "the prefill and decode overrides fall back to the common flag in one place only",
        "never: read-only",
    ),
)


def require_supported_sglang() -> None:
    """Refuse a version of SGLang that this package was not tested with.

    Raises:
        ValueError: naming both versions and the fix.
    """
    found = version("sglang")
    if found != SUPPORTED_SGLANG:
        raise ValueError(
            f"--speculative-algorithm ORTHRUS needs sglang {SUPPORTED_SGLANG}, but {found} is installed: "
            f"pip install sglang=={SUPPORTED_SGLANG}"
        )


@contextmanager
def qwen3_attention_class(attention: type) -> Iterator[None]:
    """Build Qwen3 layers with `attention` in place of `Qwen3Attention` for the duration."""
    from sglang.srt.models import qwen3

    stock = qwen3.Qwen3Attention
    qwen3.Qwen3Attention = attention
    try:
        yield
    finally:
        qwen3.Qwen3Attention = stock


def widen_req_to_token_rows(block_size: int) -> None:
    """Give every request's row of `req_to_token` columns for two blocks past the context length.

    Must run in the scheduler process before the pools are made; a second call changes nothing.
    """
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size

    def headroom(stock: Callable[..., int]) -> Callable[..., int]:
        @wraps(stock)
        def widened(*args: Any, **kwargs: Any) -> int:
            return max(stock(*args, **kwargs), 2 * block_size + get_alloc_page_size() - 1)

        return widened

    _wrap_once(kv_cache_configurator, "get_req_to_token_extra_context_len", headroom)


def use_graph_runner(model_runner: Any, runner: type) -> None:
    """Have SGLang capture its decode graphs with `runner`, and keep no logits buffer for blocks.

    Must run before the graphs are captured.
    """

    def max_shared_logits_buffer_rows() -> int:
        """A row per request: what prefill graphs use, and plain SGLang allocates."""
        return int(model_runner.max_decode_logits_rows()) // int(model_runner.decode_num_tokens_per_req())

    model_runner._decode_cuda_graph_runner_cls = lambda: runner
    model_runner.max_shared_logits_buffer_rows = max_shared_logits_buffer_rows


def choose_as_if_alone(model_runner: Any) -> None:
    """Have prefill choose every request's first token as if the request were alone in its batch."""
    from sglang_orthrus.sampling.first_token import FirstTokenSampler

    model_runner.sampler = FirstTokenSampler()


def refuse_requests(reason: Callable[[Any], str | None]) -> None:
    """Answer 400 to every generation request for which `reason(req)` returns a sentence.

    Must run in the scheduler process before it takes requests; a second call changes nothing.
    """
    from sglang.srt.managers.scheduler import Scheduler

    def admission(stock: Callable[..., str | None]) -> Callable[..., str | None]:
        @wraps(stock)
        def validate(self: Any, req: Any) -> str | None:
            return stock(self, req) or reason(req)

        return validate

    _wrap_once(Scheduler, "validate_dllm_request", admission)


def check_weight_updates(problem: Callable[[str], str | None]) -> None:
    """Answer 400 to every update of weights from a folder for which `problem(folder)` returns a sentence.

    Must run in the scheduler process; a second call changes nothing.
    """
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    def checked(stock: Callable[..., tuple[bool, str]]) -> Callable[..., tuple[bool, str]]:
        @wraps(stock)
        def update_weights_from_disk(self: Any, model_path: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
            found = problem(model_path)
            return (False, found) if found else stock(self, model_path, *args, **kwargs)

        return update_weights_from_disk

    _wrap_once(WeightUpdater, "update_weights_from_disk", checked)


def stop_at_first_match() -> None:
    """End a text at the first stop of a round, as it would end if its tokens had come one by one.

    Must run in the scheduler process; a second call changes nothing.
    """
    from sglang.srt.managers.schedule_batch import Req

    def one_by_one(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def update_finish_state(self: Any, new_accepted_len: int = 1) -> None:
            wanted = self.sampling_params
            is_run = new_accepted_len > 1 and not self.finished() and not self.to_finish
            if is_run and (wanted.stop_strs or wanted.stop_regex_strs):
                _look_for_stops(self, new_accepted_len)
            stock(self, new_accepted_len)
            if self.finished() and self.finished_len is None and len(self.output_ids) > wanted.max_new_tokens:
                self.finished_len = wanted.max_new_tokens  # aborted in a round that runs past the limit
            cut_reasoning(self)

        return update_finish_state

    _wrap_once(Req, "update_finish_state", one_by_one)


def continue_sessions_at_the_end() -> None:
    """Build a session's next prompt on the former answer, without what its last round committed past the end.

    Must run in the scheduler process; a second call changes nothing.
    """
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

    _wrap_once(Session, "_concat_token_arrays", trimmed, staticmethod)


def stream_tool_calls_in_pieces() -> None:
    """Stream all that a round says around and in tool calls, as if its text had come token by token.

    Must run in the process that answers HTTP; a second call changes nothing.
    """
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    from sglang_orthrus.compat.tool_streams import Parsed, ToolStream

    def cut(stock: Callable[..., Parsed]) -> Callable[..., Parsed]:
        @wraps(stock)
        def parse_stream_chunk(self: Any, chunk_text: str) -> Parsed:
            if not hasattr(self, "_orthrus_stream"):
                self._orthrus_stream = ToolStream(self.detector, lambda text: stock(self, text))
            stream: ToolStream = self._orthrus_stream
            return stream.parse(chunk_text)

        return parse_stream_chunk

    def complete(stock: Callable[..., Parsed]) -> Callable[..., Parsed]:
        @wraps(stock)
        def parse_stream_end(self: Any) -> Parsed:
            text, calls = self._orthrus_stream.end() if hasattr(self, "_orthrus_stream") else ("", [])
            more_text, more = stock(self)
            return text + more_text, calls + more

        return parse_stream_end

    _wrap_once(FunctionCallParser, "parse_stream_chunk", cut)
    _wrap_once(FunctionCallParser, "parse_stream_end", complete)


def begin_llguidance_behind_a_reasoning() -> None:
    """Give llguidance's backend what a reasoning parser asks of one, and have a grammar that failed fill no more masks.

    A second call changes nothing.
    """
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend, GuidanceGrammar, allocate_token_bitmask

    def allocate_vocab_mask(self: Any, vocab_size: int, batch_size: int, device: Any) -> Any:
        return allocate_token_bitmask(batch_size, self.llguidance_tokenizer.vocab_size)

    def unless_failed(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def fill_vocab_mask(self: Any, vocab_mask: Any, idx: int) -> None:
            if not self.ll_matcher.is_error():
                stock(self, vocab_mask, idx)

        return fill_vocab_mask

    if not hasattr(GuidanceBackend, "allocate_vocab_mask"):
        GuidanceBackend.allocate_vocab_mask = allocate_vocab_mask
        GuidanceBackend.move_vocab_mask = staticmethod(GuidanceGrammar.move_vocab_mask)
        GuidanceBackend.apply_vocab_mask = staticmethod(GuidanceGrammar.apply_vocab_mask)
    _wrap_once(GuidanceGrammar, "fill_vocab_mask", unless_failed)


def fence_delayed_rounds() -> None:
    """Keep what the scheduler writes next behind what the rest of a round reads (see `OrthrusWorker`).

    Must run in the scheduler process; a second call changes nothing.
    """
    from sglang.srt.managers.scheduler import Scheduler

    def fenced(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def launch_batch_sample_if_needed(self: Any, batch_result: Any, cur_batch: Any) -> None:
            is_delayed = batch_result is not None and batch_result.delay_sample_func is not None
            stock(self, batch_result, cur_batch)
            if is_delayed:
                self._apply_war_barrier()

        return launch_batch_sample_if_needed

    _wrap_once(Scheduler, "launch_batch_sample_if_needed", fenced)


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


def _wrap_once(
    owner: Any,
    name: str,
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    kind: Callable[[Any], Any] = lambda function: function,
) -> None:
    """Replace `owner.name` by its wrapper, unless that has happened; kind: such as `staticmethod`."""
    stock = getattr(owner, name)
    if not getattr(stock, "_sglang_orthrus", False):
        wrapped = wrapper(stock)
        wrapped._sglang_orthrus = True  # type: ignore[attr-defined]
        setattr(owner, name, kind(wrapped))
