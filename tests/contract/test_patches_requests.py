"""What the patches against requests that end SGLang's scheduler do."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.patching import as_shipped, patched_module

pytestmark = pytest.mark.contract

VOCAB = 100
CLOSED = "SGLang has closed the gap: drop the patch"
INF = float("inf")
NAN = float("nan")


def _validate(module: ModuleType, monkeypatch: pytest.MonkeyPatch, ids: list[int], **fields: Any) -> None:
    """SGLang's validation of one request in the process that answers HTTP."""
    features = SimpleNamespace(enable_encoder_swa_bounded_replay=False, enable_custom_logit_processor=True)
    monkeypatch.setattr(module, "get_exec", lambda: SimpleNamespace(features=features))
    for name in ("get_request_return_hidden_states_mode", "get_server_return_hidden_states_mode"):
        monkeypatch.setattr(module, name, lambda *args: 0)
    manager = object.__new__(module.TokenizerManager)
    manager.__dict__ |= {
        "model_config": SimpleNamespace(joint_head_config=None, pointer_head=None, vocab_size=VOCAB),
        "context_len": 50,
        "num_reserved_tokens": 0,
        "validate_total_tokens": True,
        "is_generation": True,
        "mm_processor": None,
    }
    manager._validate_one_request(GenerateReqInput(input_ids=ids, sampling_params={}, **fields), ids)


@pytest.mark.parametrize("ids", [[-1], [5, VOCAB], []])
def test_token_ids_outside_the_vocabulary_are_refused(
    ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers import tokenizer_manager

    _validate(tokenizer_manager, monkeypatch, ids)  # else the gap is closed
    patched = patched_module("0009", tmp_path, "tokenizer_manager")
    with pytest.raises(ValueError, match=r"out-of-vocabulary|at least one token"):
        _validate(patched, monkeypatch, ids)
    _validate(patched, monkeypatch, [0, VOCAB - 1])
    _validate(patched, monkeypatch, [], session_params={"id": "x"})


@pytest.mark.parametrize("fields", [{"top_logprobs_num": VOCAB + 1}, {"logprob_start_len": -2}])
def test_numbers_of_log_probabilities_are_refused(
    fields: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers import tokenizer_manager

    _validate(tokenizer_manager, monkeypatch, [1], return_logprob=True, **fields)  # else the gap is closed
    patched = patched_module("0010", tmp_path, "tokenizer_manager")
    with pytest.raises(ValueError, match=next(iter(fields))):
        _validate(patched, monkeypatch, [1], return_logprob=True, **fields)
    _validate(patched, monkeypatch, [1], **fields)
    _validate(patched, monkeypatch, [1], return_logprob=True, top_logprobs_num=-1, logprob_start_len=-1)
    _validate(patched, monkeypatch, [1], return_logprob=True, top_logprobs_num=VOCAB)


def test_embeddings_that_are_no_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers import tokenizer_manager

    _validate(tokenizer_manager, monkeypatch, [1], positional_embed_overrides={"a": 1})  # else the gap is closed
    patched = patched_module("0014", tmp_path, "tokenizer_manager")
    with pytest.raises(ValueError, match="positional_embed_overrides"):
        _validate(patched, monkeypatch, [1], positional_embed_overrides={"a": 1})
    own = PositionalEmbeds(embeds=[torch.zeros(1, 4)], positions=[0])
    _validate(patched, monkeypatch, [1], positional_embed_overrides=own)


class _Batch:
    """What the penalizers read of SGLang's `ScheduleBatch`."""

    reqs: list[Any]
    device: str


def _min_new_tokens(module: ModuleType, stops: set[int], min_new_tokens: int) -> torch.Tensor:
    """What is added to the logits of that request and of one beside it that has min_new_tokens."""
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=7)
    reqs = [
        SimpleNamespace(
            sampling_params=SimpleNamespace(stop_token_ids=own, min_new_tokens=number),
            eos_token_ids=None,
            tokenizer=tokenizer,
        )
        for own, number in ((stops, min_new_tokens), (None, 1))
    ]
    batch = _Batch()
    batch.reqs, batch.device = reqs, "cpu"
    orchestrator = BatchedPenalizerOrchestrator(VOCAB, batch, set())
    penalizer = module.BatchedMinNewTokensPenalizer(orchestrator)
    penalizer._prepare()
    logits = torch.zeros(2, VOCAB)
    penalizer._apply(logits)
    return logits


@pytest.mark.parametrize("stop", [-1, VOCAB + 1])
@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_stop_ids_outside_the_vocabulary_are_ignored(stop: int, min_new_tokens: int, tmp_path: Path) -> None:
    """Also those of a request without min_new_tokens."""
    from sglang.srt.sampling.penaltylib import min_new_tokens as stock

    with pytest.raises(RuntimeError, match="out of bounds"):
        _min_new_tokens(stock, {stop, 3}, min_new_tokens)
    patched = patched_module("0011", tmp_path, "min_new_tokens")
    logits = _min_new_tokens(patched, {stop, 3}, min_new_tokens)
    assert logits[0].isinf().nonzero().flatten().tolist() == ([3, 7] if min_new_tokens else [])
    assert logits[1].isinf().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": 2**31},
        {"min_new_tokens": 2**31, "max_new_tokens": None},
        {"temperature": 1e39},
        {"repetition_penalty": 1e-40},
        {"logit_bias": {"5": NAN}},
        {"logit_bias": {"5": INF}},
        {"logit_bias": {"5": 3e38}},
        {"temperature": 0.0, "is_normalized": True},
    ],
)
def test_sampling_parameters_that_no_tensor_holds_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    SamplingParams(**given).verify(VOCAB)  # else the gap is closed
    patched = patched_module("0012", tmp_path, "sampling_params")
    with pytest.raises(ValueError, match=r"must be at|cannot be set"):
        patched.SamplingParams(**given).verify(VOCAB)
    for served in ({}, {"temperature": 0.0}, {"top_k": -1}, {"logit_bias": {"5": -INF, "6": -1e100, "7": 100.0}}):
        patched.SamplingParams(**served).verify(VOCAB)


class _Mask:
    """A grammar that allows the first two tokens."""

    @staticmethod
    def apply(logits: torch.Tensor) -> None:
        logits[:, 2:] = -INF


def _first_token_logits(
    info_module: ModuleType, sampler_module: ModuleType, monkeypatch: pytest.MonkeyPatch, written: float | None
) -> torch.Tensor:
    """What SGLang samples from; written: by a custom processor to all logits; None for a bias of -inf instead."""
    info = object.__new__(info_module.SamplingBatchInfo)
    info.__dict__ |= {
        "penalizer_orchestrator": None,
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "grammar_mask": _Mask,
        "logit_bias": torch.full((1, 4), -INF) if written is None else None,
        "has_custom_logit_processor": written is not None,
    }
    if written is not None:
        monkeypatch.setattr(sampler_module, "apply_custom_logit_processor", lambda logits, info: logits.fill_(written))
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    info.apply_logits_bias(logits)
    found: torch.Tensor = sampler_module.Sampler._preprocess_logits(SimpleNamespace(), logits, info)
    return found


@pytest.mark.parametrize("written", [None, -INF, NAN])
def test_options_give_way_to_the_grammar(
    written: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers import sampler
    from sglang.srt.sampling import sampling_batch_info

    stock = _first_token_logits(sampling_batch_info, sampler, monkeypatch, written)
    assert not torch.softmax(stock, dim=-1).isfinite().any(), CLOSED
    info = patched_module("0013", tmp_path, "sampling_batch_info")
    patched = _first_token_logits(info, patched_module("0013", tmp_path, "sampler"), monkeypatch, written)
    assert patched.tolist() == [[1.0, 2.0, -INF, -INF]]


def _sampled(module: ModuleType, row: list[float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of a request with these logits and of one beside it that can only get token 2."""
    monkeypatch.setattr(module, "get_exec", lambda: SimpleNamespace(kernel=SimpleNamespace(sampling_backend="pytorch")))
    sampler = object.__new__(module.Sampler)
    torch.nn.Module.__init__(sampler)
    sampler.rl_on_policy_target, sampler.use_ascend_backend, sampler.use_log_softmax_logprob = None, False, False
    sampler.enable_deterministic = True  # softmax of PyTorch
    info = SimpleNamespace(
        is_all_greedy=False,
        has_custom_logit_processor=False,
        need_top_p_sampling=True,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        temperatures=torch.full((2, 1), 0.7),
        top_ks=torch.full((2,), 4),
        top_ps=torch.full((2,), 0.9),
        min_ps=torch.zeros(2),
        max_top_k=None,
        sampling_seed=None,
        sampling_mask_batch_indices=None,
        sampling_support_logprobs_capture_indices=None,
        grammars=None,
    )
    output = SimpleNamespace(next_token_logits=torch.tensor([row, [-INF, -INF, 1.0, -INF]]))
    tokens = sampler(output, info, False, [0, 0], [None, None], torch.zeros(2))
    found: list[int] = tokens.tolist()
    return found


@pytest.mark.parametrize("row", [[1.0, NAN, 0.0, 2.0], [NAN] * 4, [-INF] * 4, [0.0, INF, 0.0, 0.0]])
def test_a_row_without_a_distribution_harms_no_other(
    row: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model gives NaN, or a grammar allows nothing."""
    from sglang.srt.layers import sampler

    with pytest.raises(RuntimeError, match="probability tensor contains"):
        _sampled(sampler, row, monkeypatch)
    patched = patched_module("0019", tmp_path, "sampler")
    first, second = _sampled(patched, row, monkeypatch)
    assert 0 <= first < 4
    assert second == 2
    likely = [_sampled(patched, [0.0, 0.0, 0.0, 50.0], monkeypatch) for _ in range(5)]
    assert likely == [[3, 2]] * 5, "another row is left alone"


@pytest.mark.parametrize(("texts", "n"), [("a", 4097), (["a", "b"], 2049)])
def test_a_request_asks_for_so_many_texts(
    texts: str | list[str], n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As shipped, it is copied n times, whatever n is."""
    from sglang.srt.managers import io_struct

    as_shipped(monkeypatch, io_struct.GenerateReqInput, "_handle_parallel_sampling")

    def normalised(module: ModuleType, n: int) -> Any:
        request = module.GenerateReqInput(text=texts, sampling_params={"n": n})
        request.normalize_batch_and_arguments()
        return request

    assert len(normalised(io_struct, n).text) > 4096, CLOSED
    patched = patched_module("0024", tmp_path, "io_struct")
    with pytest.raises(ValueError, match="n must be at most 4096"):
        normalised(patched, n)
    with pytest.raises(ValueError, match="n must be at most 4096"):
        normalised(patched, 2**32)
    assert len(normalised(patched, n - 1).text) == 4096
    many = patched.GenerateReqInput(text=["a"] * 5000, sampling_params={"n": 1})
    many.normalize_batch_and_arguments()
    assert len(many.text) == 5000, "a request pays for its inputs by its size"
