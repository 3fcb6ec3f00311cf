"""Quantised checkpoints and flags: ORTHRUS against plain SGLang on the same quantised weights.

Checkpoints of other quantisers are compared, too, if ORTHRUS_QUANTISED names a directory of them: docs/quantization.md
says how to make them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.models.checkpoint import export_ar
from sglang_orthrus.models.graft import graft
from tests.gpu.against_plain import Answers, answers_of, check
from tests.quantised import write_w4a16

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

FLAGS = {"fp8": ("--quantization", "fp8"), "fp8 KV": ("--kv-cache-dtype", "fp8_e4m3")}
MADE_ELSEWHERE = tuple(sorted(Path(os.environ.get("ORTHRUS_QUANTISED", "/nowhere")).glob("*/config.json")))
CASES = (*FLAGS, "both views", "AR view", *(config.parent.name for config in MADE_ELSEWHERE))
AT_ONCE = 3


def checkpoint_of(case: str, folder: Path) -> Path:
    """Nano in one form or another, made if need be."""
    if case == "both views":
        return write_w4a16(NANO, folder / "both")
    if case == "AR view":
        return graft(write_w4a16(export_ar(NANO, folder / "ar"), folder / "quantised"), NANO, folder / "grafted")
    return next((config.parent for config in MADE_ELSEWHERE if config.parent.name == case), NANO)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Answers]]]:
    """Of all cases, some at once: a server spends most of its start-up on a processor core."""

    def get(case: str, folder: Path) -> Answers:
        return answers_of(checkpoint_of(case, folder), FLAGS.get(case, ()), folder)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {case: pool.submit(get, case, tmp_path_factory.mktemp("case")) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_plain_sglangs_on_the_same_weights(case: str, answers: dict[str, Future[Answers]]) -> None:
    check(case, answers[case].result())
