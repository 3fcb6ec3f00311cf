"""How SGLang's functions are wrapped at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def wrap_once(
    owner: Any,
    name: str,
    wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    kind: Callable[[Any], Any] = lambda function: function,
) -> None:
    """Replace `owner.name` by its wrapper; a second call changes nothing. kind: such as `staticmethod`."""
    stock = getattr(owner, name)
    if not getattr(stock, "_sglang_orthrus", False):
        wrapped = wrapper(stock)
        wrapped._sglang_orthrus = True  # type: ignore[attr-defined]
        setattr(owner, name, kind(wrapped))
