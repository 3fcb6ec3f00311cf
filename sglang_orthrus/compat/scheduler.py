"""The scheduler: which requests and weights it takes, and what it waits for behind a delayed round."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.wrapping import wrap_once


@depends_on(
    "sglang.srt.managers.scheduler:Scheduler.validate_dllm_request",
    "req",
    what="wrapped: requests with options that ORTHRUS cannot serve exactly get a 400",
    why="the names of SGLang's own algorithms decide which requests it validates",
    until="CustomSpecAlgo can validate requests",
)
def refuse_requests(reason: Callable[[Any], str | None]) -> None:
    """Answer 400 to every generation request for which `reason(req)` returns a sentence."""
    from sglang.srt.managers.scheduler import Scheduler

    def admission(stock: Callable[..., str | None]) -> Callable[..., str | None]:
        @wraps(stock)
        def validate(self: Any, req: Any) -> str | None:
            return stock(self, req) or reason(req)

        return validate

    wrap_once(Scheduler, "validate_dllm_request", admission)


@depends_on(
    "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_disk",
    "model_path",
    what="wrapped: a checkpoint without the diffusion view gets a 400",
    why="when loading fails, SGLang rolls back to the folder that has just failed, and the scheduler dies",
    until="SGLang rolls back to the former folder (patches/0022)",
)
def check_weight_updates(problem: Callable[[str], str | None]) -> None:
    """Answer 400 to every update of weights from a folder for which `problem(folder)` returns a sentence."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    def checked(stock: Callable[..., tuple[bool, str]]) -> Callable[..., tuple[bool, str]]:
        @wraps(stock)
        def update_weights_from_disk(self: Any, model_path: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
            found = problem(model_path)
            return (False, found) if found else stock(self, model_path, *args, **kwargs)

        return update_weights_from_disk

    wrap_once(WeightUpdater, "update_weights_from_disk", checked)


class DelayedPart:
    """The part of a round that the scheduler calls for when it has processed the former round's result.

    Args:
        run: returns the round's result.
        runs_pass: whether it runs a forward pass, rather than choose tokens only.
    """

    def __init__(self, run: Callable[[], Any], *, runs_pass: bool) -> None:
        self._run = run
        self.runs_pass = runs_pass

    def __call__(self) -> Any:
        """Run it."""
        return self._run()


_RESULTS_FIRST = "the scheduler processes results before it calls a worker's grammar barrier"


@depends_on(
    "sglang.srt.managers.scheduler:Scheduler.launch_batch_sample_if_needed",
    "batch_result",
    "cur_batch",
    what="wrapped: the fence of a step comes behind its delayed part, too, if that runs a forward pass",
    why="SGLang delays only sampling; a round with grammars delays its verify pass, so that the scheduler processes "
    "the former round's result while the GPU drafts",
    until=_RESULTS_FIRST,
)
@depends_on(
    "sglang.srt.managers.scheduler:Scheduler._apply_war_barrier",
    what="called behind the delayed part",
    why="it is the fence that SGLang puts behind a forward pass",
    until=_RESULTS_FIRST,
)
def fence_delayed_rounds() -> None:
    """Have the scheduler write nothing that a delayed pass of a round may still read (see `OrthrusWorker`)."""
    from sglang.srt.managers.scheduler import Scheduler

    def fenced(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def launch_batch_sample_if_needed(self: Any, batch_result: Any, cur_batch: Any) -> None:
            delayed = None if batch_result is None else batch_result.delay_sample_func
            stock(self, batch_result, cur_batch)
            if isinstance(delayed, DelayedPart) and delayed.runs_pass:
                self._apply_war_barrier()

        return launch_batch_sample_if_needed

    wrap_once(Scheduler, "launch_batch_sample_if_needed", fenced)
