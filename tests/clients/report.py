"""Runs what a client is asked to do, and prints what came of it as JSON.

The programs of this folder run in an environment of their own (`make clients`), where nothing but clients is installed:
`python -m tests.clients.openai_client http://127.0.0.1:30000`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

Case = Callable[[str], Any]
# Ids and times in messages, which differ between two requests.
_CHANCE = re.compile(r"[0-9a-f]{24,}|created=\d+|0x[0-9a-f]+")


def run(cases: dict[str, Case]) -> None:
    """Print, for every case, what it returned, or the exception that a user would see: the last line of the output."""
    url = sys.argv[1]
    print()
    print(json.dumps({name: _outcome(case, url) for name, case in cases.items()}, default=_plain))


def _outcome(case: Case, url: str) -> dict[str, Any]:
    try:
        return {"result": case(url)}
    except Exception as error:  # noqa: BLE001 (every client has errors of its own)
        return {"error": _CHANCE.sub("", f"{type(error).__name__}: {error}")}


def _plain(value: object) -> Any:
    """What JSON can hold of a value."""
    return value.model_dump() if isinstance(value, BaseModel) else str(value)
