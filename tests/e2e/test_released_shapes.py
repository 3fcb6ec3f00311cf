"""Checkpoints with the released models' config and tokenizer files, cut to two layers, with dummy weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_orthrus.cli.demo import ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.fixtures import write_released_shaped

pytestmark = pytest.mark.e2e

SMALL = ("--dtype", "bfloat16", "--context-length", "512", "--max-total-tokens", "1024")


@pytest.mark.slow
def test_a_released_shape_is_served(tmp_path: Path) -> None:
    """The smallest one. The others differ in sizes, and in an untied head, which test_views.py covers."""
    model = write_released_shaped(tmp_path / "checkpoint", "1.7B")
    with Server(model, "--load-format", "dummy", *ORTHRUS_ARGS, *SMALL) as server:
        reply = server.post(
            "/generate",
            {"text": "Hello", "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}},
        )
    assert len(reply["output_ids"]) == 4
    assert 1 <= reply["meta_info"]["spec_verify_ct"] <= 3
