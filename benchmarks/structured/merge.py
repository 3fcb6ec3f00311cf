"""One result from the slices of a run: python -m benchmarks.structured.merge OUT SLICE...

Each slice is the file of a `python -m benchmarks.structured ... --slice I/N`. Counts are added up and rates made of the
sums, so that tokens per second stay those of one server on the cores of one slice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.slices import Slice, check_all
from benchmarks.structured.figures import SETTING, merged


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All slices of one run.

    Raises:
        ValueError: if a slice is missing, or there twice, or not finished.
    """
    check_all([Slice(*part["slice"]) for part in parts])
    # A slice may have no case of a small set, but it has its servers.
    servers = [{tuple(row[key] for key in SETTING[:3]) for row in part["rows"]} for part in parts]
    if any(found != servers[0] for found in servers):
        raise ValueError("some slices have rows of servers that others lack: not all of them are finished")
    return {
        "provenance": parts[0]["provenance"],
        "slices": len(parts),
        "rows": merged([part["rows"] for part in parts]),
    }


def main() -> None:
    out, *paths = map(Path, sys.argv[1:])
    result = merge([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in result["rows"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
