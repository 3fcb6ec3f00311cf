"""Server arguments that matter to kernels: ORTHRUS against plain SGLang with the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_orthrus.cli.demo import NANO
from tests.gpu.against_plain import answers_of, check

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

FLAGS = {
    "fp16, pages of 64": ("--dtype", "float16", "--page-size", "64", "--chunked-prefill-size", "-1"),
    "fp16, pages of 64, FlashInfer": (
        *("--dtype", "float16", "--page-size", "64", "--attention-backend", "flashinfer"),
        *("--sampling-backend", "flashinfer"),
    ),
    "no graphs": ("--disable-cuda-graph",),
    "no graphs of decoding, nor of prefills": ("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph"),
    "batches of a graph's size only": ("--disable-cuda-graph-padding",),
    # Prompts come in parts, beside which others decode.
    "mixed chunks": ("--enable-mixed-chunk", "--chunked-prefill-size", "32"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_answers_are_plain_sglangs(case: str, tmp_path: Path) -> None:
    check(case, answers_of(NANO, FLAGS[case], tmp_path))
