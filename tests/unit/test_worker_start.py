"""What the worker does when all is captured."""

from __future__ import annotations

import gc
import weakref

from sglang_orthrus.round.worker import leave_out_of_collections


class _Cycle:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


def test_collections_pass_over_what_a_server_starts_with() -> None:
    garbage = weakref.ref(_Cycle())
    before = gc.get_freeze_count()
    try:
        leave_out_of_collections()
        # What was of no use then is not kept for good.
        assert garbage() is None
        assert gc.get_freeze_count() > before + 100_000
        assert len(gc.get_objects()) < 10_000
        later = weakref.ref(_Cycle())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()
