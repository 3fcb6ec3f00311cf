"""CUDA graphs' stand-in on a CPU, as an SGLang plugin: what was captured runs again, on the same buffers.

SGLang's graph runner and ours are the real ones. As with a CUDA graph, Python outside the captured function is not run
again, inputs reach it through the runner's buffers alone, and the attention plan is made anew for every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend

BATCH_SIZES = (1, 4)


class ReplayBackend(BaseCudaGraphBackend):
    """Keeps functions where `FullCudaGraphBackend` keeps graphs."""

    def __init__(self, runner: Any, **options: Any) -> None:
        self._captured: dict[Any, Callable[[], Any]] = {}

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], *args: Any, **kwargs: Any) -> None:
        assert shape_key not in self._captured
        forward_fn()
        self._captured[shape_key] = forward_fn

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self._captured

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        return self._captured[shape_key]()

    def cleanup(self) -> None:
        self._captured.clear()


def register() -> None:
    """Let the graph runner run on the CPU platform, with captured functions for graphs."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as runner
    from sglang.srt.platforms.interface import PlatformCapabilities

    from sglang_orthrus.cpu.attention import OrthrusCpuAttnBackend
    from sglang_orthrus.cpu.platform import OrthrusCpuPlatform

    ForwardMode.is_cpu_graph = ForwardMode.is_cuda_graph
    OrthrusCpuPlatform.get_full_graph_backend_cls = lambda self: ReplayBackend
    OrthrusCpuPlatform.capabilities = PlatformCapabilities(graph_capture=True)
    runner.get_batch_sizes_to_capture = lambda *args, **kwargs: (list(BATCH_SIZES), [])
    runner.graph_capture = lambda stream: nullcontext(SimpleNamespace(stream=stream))
    runner.get_or_create_global_graph_capture_stream = lambda: None
    runner.DecodeCudaGraphRunner._record_in_graph_metadata_prep_done = lambda self: None
    runner.DecodeCudaGraphRunner._publish_read_done = lambda self, in_graph: None

    OrthrusCpuAttnBackend.init_cuda_graph_state = lambda self, max_bs, max_num_tokens: None
    OrthrusCpuAttnBackend.get_cuda_graph_seq_len_fill_value = lambda self: 1
    OrthrusCpuAttnBackend.init_forward_metadata_out_graph = lambda self, batch, in_capture=False: (
        self.init_forward_metadata(batch)
    )
    OrthrusCpuAttnBackend.init_forward_metadata_in_graph = lambda self, batch: None

    def capture(*, model_runner: Any) -> Any:
        model_runner.graph_shared_output = GraphSharedOutput(device="cpu", max_rows=max(BATCH_SIZES))
        return cuda_graph_setup.GraphCapture(
            runner=model_runner._decode_cuda_graph_runner_cls()(model_runner),
            memory_phase="target_verify",
            memory_usage_gb=0,
            capture_time=0,
        )

    cuda_graph_setup.capture_decode_graph = capture
