"""Entry point of `sglang.srt.plugins`: runs in every SGLang process, so it is light and may run twice."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from typing import Any

from sglang_orthrus import __version__
from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.config import ARCHITECTURES, DualViewConfig
from sglang_orthrus.server_args.algorithm import NAME, OrthrusAlgorithm
from sglang_orthrus.server_args.refusals import validate_server_args

logger = logging.getLogger(__name__)

MODEL_PACKAGE = "sglang_orthrus.models"
_MODEL_PACKAGE_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def register() -> None:
    """Teach SGLang the ORTHRUS algorithm, the `OrthrusLM` architecture and the `orthrus` model type."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import get_spec

    if get_spec(NAME) is not None:
        return
    _register_config()
    _register_models()
    SpeculativeAlgorithm.register(
        NAME,
        supports_overlap=True,
        validate_server_args=_prepare,
        spec_class=OrthrusAlgorithm,
    )(_worker_class)
    logger.info("sglang-orthrus %s: --speculative-algorithm %s is available", __version__, NAME)


def _prepare(server_args: Any) -> None:
    """Runs where an ORTHRUS server's arguments are read: in the process that answers HTTP, too."""
    from sglang_orthrus.compat.install import install_in_http_server
    from sglang_orthrus.compat.requests import RequestChecks
    from sglang_orthrus.server_args.admission import raw_problem, tokenized_problem, unreadable
    from sglang_orthrus.server_args.admission_values import samples_problem

    validate_server_args(server_args)
    checks = RequestChecks(samples=samples_problem, raw=raw_problem, types=unreadable, values=tokenized_problem)
    install_in_http_server(checks)


@depends_on(
    "sglang.srt.arg_groups.model_override_base:model_config_of",
    "server_args",
    what="reads the checkpoint's configuration before the worker exists",
    why="a worker factory gets the arguments alone",
    until="never: it only reads",
)
def _worker_class(server_args: Any) -> type:
    """Runs in a scheduler process, which alone needs the worker, and with it the model code."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.runtime_context import get_exec

    from sglang_orthrus.compat.install import install_in_scheduler
    from sglang_orthrus.models.checkpoint import folder_problem
    from sglang_orthrus.round.worker import OrthrusWorker
    from sglang_orthrus.server_args.admission import refusal

    hf_config = model_config_of(server_args).hf_config
    install_in_scheduler(
        DualViewConfig.from_hf(hf_config).block_size,
        refusal=partial(refusal, are_seeded=get_exec().deterministic.enable_deterministic_inference),
        weights_problem=partial(folder_problem, num_layers=hf_config.num_hidden_layers),
    )
    return OrthrusWorker


def _register_config() -> None:
    """Released configs say `qwen3`; the official code's class says `orthrus`, and both are read alike."""
    from transformers import AutoConfig, Qwen3Config

    class OrthrusConfig(Qwen3Config):
        model_type = "orthrus"

    AutoConfig.register(OrthrusConfig.model_type, OrthrusConfig, exist_ok=True)


def _register_models() -> None:
    """Through the variable, the registry imports our package when it is first needed, in each process."""
    is_ours = os.environ.setdefault(_MODEL_PACKAGE_VARIABLE, MODEL_PACKAGE) == MODEL_PACKAGE
    if is_ours and "sglang.srt.models.registry" not in sys.modules:
        return
    # The user has a package there already, or the registry has read the variable.
    from sglang.srt.models.registry import ModelRegistry

    if ARCHITECTURES[0] not in ModelRegistry.models:
        ModelRegistry.register(MODEL_PACKAGE)
