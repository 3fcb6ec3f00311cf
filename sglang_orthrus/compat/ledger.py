"""How a dependence on SGLang's internals is written down."""

from __future__ import annotations

from typing import NamedTuple


class Touch(NamedTuple):
    """One private SGLang symbol that this package relies on; `tests/contract` checks every one.

    Attributes:
        target: "module:attribute", dotted below the module.
        params: names of the parameters that we pass or replace, in no order.
        what: what is done with it.
        why: why no public seam would do.
        remove_when: what makes the entry go away.
    """

    target: str
    params: tuple[str, ...]
    what: str
    why: str
    remove_when: str
