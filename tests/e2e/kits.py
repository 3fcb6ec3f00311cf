"""SGLang's own test kits (`sglang.test.kits`): which run against ORTHRUS on nano, with what, and which can't, and why.

The tables are complete: `test_kits.py` compares them with the installed wheel. docs/kits.md explains the reasons.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sglang.test.kits

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z]{1,12}$"},
            "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
            "country": {"type": "string", "pattern": "^[A-Za-z]{1,12}$"},
            "capital": {"type": "string", "pattern": "^[A-Za-z]{1,12}$"},
        },
        "required": ["name", "population", "country", "capital"],
        "additionalProperties": False,
    }
)
"""The kits' schemas with bounded strings and numbers: nano does not end an unbounded one within 128 tokens."""

SAMPLING_MASKS = "asks for sampling masks, which are refused"
HIDDEN_STATES = "asks for hidden states, which are refused"
DATASET = "scores a language model on a data set that it downloads; nano knows nothing of the kind"
IMAGES = "needs a vision model"
VOCABULARY = "draws token ids up to 30000 and scores a language model on a data set"
CUDA = "measures or needs CUDA kernels"


@dataclass(frozen=True)
class Kit:
    """How one class of a kit runs.

    Attributes:
        server: which server of `test_kits.py` it needs; all but "common" are left to `make kits`.
        overrides: attributes that the kit leaves to the class that mixes it in.
        refused: its tests that ask for what ORTHRUS refuses, and why.
        fails_alike: its tests that ask for knowledge, or a cache, that nano has not; plain SGLang fails them with
            the same message.
        slow: its tests that are left to `make kits`, too; all if None.
    """

    server: str = "common"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    fails_alike: frozenset[str] = frozenset()
    slow: frozenset[str] | None = frozenset()


RUN: Mapping[str, Kit] = MappingProxyType(
    {
        "basic_api_contract_kit.BasicAPIContractMixin": Kit(),
        "basic_decode_correctness_kit.BasicDecodeCorrectnessMixin": Kit(
            fails_alike=frozenset({"test_capital_france", "test_basic_math", "test_color_completion"})
        ),
        "basic_scheduler_stress_kit.BasicSchedulerStressMixin": Kit(
            fails_alike=frozenset({"test_streaming_response", "test_concurrent_requests"}),
            slow=frozenset({"test_long_prompt"}),
        ),
        "abort_timeout_kit.AbortAllMixin": Kit(slow=None),
        "abort_timeout_kit.WaitingTimeoutMixin": Kit("narrow"),
        "abort_timeout_kit.RunningTimeoutTwoWaveMixin": Kit("hasty"),
        "matched_stop_kit.MatchedStopMixin": Kit("narrow", fails_alike=frozenset({"test_finish_stop_eos"})),
        "prefix_cache_branching_kit.PrefixCacheBranchingMixin": Kit(
            overrides={"cache_chunk_size": 64}, fails_alike=frozenset({"test_prefix_cache_branching"})
        ),
        "json_constrained_kit.JSONConstrainedMixin": Kit(
            overrides={"json_schema": SCHEMA}, slow=frozenset({"test_mix_json_and_other"})
        ),
        "json_mode_kit.JSONModeMixin": Kit(),
        "regex_constrained_kit.RegexConstrainedMixin": Kit(fails_alike=frozenset({"test_regex_generate_complex_json"})),
        "ebnf_constrained_kit.EBNFConstrainedMixin": Kit(fails_alike=frozenset({"test_ebnf_generate_complex_json"})),
        "reasoning_kit.ReasoningTokenUsageMixin": Kit(overrides={"reasoning_parser_name": "qwen3"}),
        "reasoning_kit.SeparateReasoningMixin": Kit(),
        "anthropic_messages_kit.AnthropicMessagesMixin": Kit("narrow"),
        "pause_generation_kit.PauseResumeInPlaceMixin": Kit(
            overrides={
                "pause_num_requests": 8,
                "pause_max_new_tokens": 256,
                "pause_ignore_eos": True,
                "pause_duration": 2,
            },
            slow=None,
        ),
        "spec_decoding_kit.SpecDecodingMixin": Kit(
            overrides={"accept_length_thres": 1.2, "bs_1_speed_thres": 1.0, "bs_1_speed_attempts": 1}, slow=None
        ),
        "spec_server_kits.SpecCorrectnessKit": Kit(
            overrides={"acc_length_thres": 1.2, "batch_accept_len_thres": 1.2}, slow=frozenset({"test_acc_length"})
        ),
        "spec_server_kits.SpecFeatureKit": Kit(slow=None),
        "spec_server_kits.SpecGrammarKit": Kit(
            overrides={"grammar_json_schema": SCHEMA},
        ),
        "spec_server_kits.SpecLogprobKit": Kit("hot", overrides={"logprob_match_delta": 1e-3}),
        "spec_server_kits.SpecPenaltyKit": Kit("hot"),
        "streaming_session_kit.StreamingSessionKitMixin": Kit("endless"),
        "streaming_session_kit.AbortLeakReproKitMixin": Kit("short"),
    }
)

NOT_RUN: Mapping[str, str] = MappingProxyType(
    {
        "eval_accuracy_kit.MMLUSanityMixin": DATASET,
        "eval_accuracy_kit.GSM8KMixin": DATASET,
        "eval_accuracy_kit.MMLUMixin": DATASET,
        "eval_accuracy_kit.MMMUProMixin": IMAGES,
        "eval_accuracy_kit.HumanEvalMixin": DATASET,
        "eval_accuracy_kit.MGSMEnMixin": DATASET,
        "lm_eval_kit.LMEvalMixin": DATASET,
        "fwd_occupancy_kit.FwdOccupancyMixin": CUDA,
        "kl_divergence_kit.KLDivergenceMixin": DATASET,
        "mmmu_vlm_kit.MMMUMixin": IMAGES,
        "pd_parity_kit.PDLogprobParityMixin": "needs prefill-decode disaggregation, which is refused",
        "spec_server_kits.SpecAccuracyKit": DATASET,
        "spec_server_kits.SpecPerfKit": DATASET,
        "spec_server_kits.SpecParityKit": "starts servers itself, for CUDA; test_parity.py compares more",
        "spec_server_kits.SpecHiddenStatesKit": HIDDEN_STATES,
        "spec_server_kits.SpecSamplingMaskKit": SAMPLING_MASKS,
        "unified_radix_cache_kit.UnifiedRadixTreeTestMixin": VOCABULARY,
        "unified_radix_cache_kit.AccuracyTwoPassMixin": DATASET,
    }
)

WITHOUT_TESTS: Mapping[str, str] = MappingProxyType(
    {
        "cache_hit_kit": "a function, run by test_kits.py",
        "radix_cache_server_kit": "a function, run by SpecFeatureKit",
        "perf_bench_kit": "reports numbers of SGLang's benchmarks",
        "vlm_perf_kit": IMAGES,
        "dsa_metadata_kit": CUDA,
        "attention_unittest": "builds attention layers without a server, on CUDA",
        "unified_radix_cache": "builds radix trees without a server or a model",
    }
)


def installed_kits() -> dict[str, frozenset[str]]:
    """Every class with tests among the installed kits ("module.Class"), and the names of its tests; nothing is run."""
    root = Path(next(iter(sglang.test.kits.__path__)))
    return {
        f"{'.'.join(path.relative_to(root).with_suffix('').parts)}.{node.name}": tests
        for path in sorted(root.rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and (tests := frozenset(_tests(node)))
    }


def installed_modules() -> set[str]:
    """The modules and packages directly below `sglang.test.kits`."""
    root = Path(next(iter(sglang.test.kits.__path__)))
    found = {path.stem for path in root.iterdir() if path.suffix == ".py" or path.joinpath("__init__.py").is_file()}
    return found - {"__init__"}


def _tests(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name.startswith("test"):
            yield item.name
