"""Tell what SGLang resolves launches to: python -m tests.contract.resolving LAUNCHES prints JSON.

LAUNCHES is a JSON list of lists of flags.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import prepare_server_args

FIELDS = (
    *("device", "dtype", "attention_backend", "sampling_backend", "max_total_tokens", "max_running_requests"),
    *("sleep_on_idle", "disable_overlap_schedule"),
)


def resolve(flags: list[str]) -> dict[str, Any]:
    """The fields after resolution."""
    args = prepare_server_args(flags)
    args.resolve_once()
    view = resolved_view(args)
    return {name: getattr(view, name) for name in FIELDS}


if __name__ == "__main__":
    results = [resolve(flags) for flags in json.loads(sys.argv[1])]
    platform, dynamo = type(current_platform).__name__, os.environ.get("TORCHDYNAMO_DISABLE")
    print(json.dumps({"platform": platform, "dynamo": dynamo, "args": results}))
