"""What the patch for the fields of answers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.shared import Metadata
from pydantic import TypeAdapter, ValidationError
from sglang.srt.utils import weight_versions

from tests.patching import patched_module

pytestmark = pytest.mark.contract

METADATA: TypeAdapter[Any] = TypeAdapter(Metadata)
SPANS = [{"version": "default", "start": 0, "end": 7}]


def test_the_metadata_of_answers_are_strings(tmp_path: Path) -> None:
    """`tests/e2e/test_clients.py` shows a client that refuses answers, and a patched server that it accepts."""
    info = {"weight_version": "default", "weight_versions": SPANS}
    with pytest.raises(ValidationError, match="weight_versions"):
        METADATA.validate_python(weight_versions.build_endpoint_weight_version_metadata(info))

    build = patched_module("0025", tmp_path, "weight_versions").build_endpoint_weight_version_metadata
    metadata = METADATA.validate_python(build(info))
    assert metadata["weight_version"] == "default"
    assert json.loads(metadata["weight_versions"]) == SPANS
    assert METADATA.validate_python(build({"weight_version": None})) == {}
