"""What SGLang's errors say, in words for people. Pure."""

from __future__ import annotations

import re
from typing import Any

_MOST_CHARACTERS = 600
_SOURCE_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_FIELD = re.compile(r"'loc': \('body', ([^)]*)\), 'msg': '([^']*)'")


def error_words(error: Any) -> str:
    """The message of an error that SGLang answers or streams, without the lines of its own source code."""
    message = error
    while isinstance(message, dict):
        message = message.get("message") or message.get("error") or message.get("detail") or str(message)
    text = str(message)
    fields = dict.fromkeys(_FIELD.findall(text))
    if fields:
        return "; ".join(f"{_path(where)}: {what}" for where, what in fields)
    text = _SOURCE_LINE.sub("", text).strip()
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " ..."


def blamed_field(message: str) -> str | None:
    """Which box of the page an error is about; None if it is about none of them."""
    lower = message.lower()
    if "grammar" in lower or "schema" in lower:
        return "schema"
    return "tools" if lower.startswith("tools") else None


def _path(location: str) -> str:
    """`'tools', 0, 'function'` as `tools[0].function`."""
    parts = [part.strip() for part in location.split(",") if part.strip()]
    names = (f".{part[1:-1]}" if part.startswith("'") else f"[{part}]" for part in parts)
    return "".join(names).lstrip(".")
