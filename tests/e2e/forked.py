"""A plugin for SGLang: a server forks its processes instead of spawning them, and so imports SGLang once, not thrice.

The shared servers `orthrus` and `plain` run without it, as users start them: each process loads its own plugins there.
"""

from __future__ import annotations

import multiprocessing


def register() -> None:
    """Called by SGLang in the main process, before that chooses how others start."""
    choose = multiprocessing.set_start_method

    def choose_fork(method: str | None, force: bool = False) -> None:
        choose("fork", force=force)

    multiprocessing.set_start_method = choose_fork
