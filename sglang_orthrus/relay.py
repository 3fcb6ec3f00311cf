"""SGLang's relay between rounds, waiting for lengths on the host as late as possible.

How many tokens a round committed is known on the GPU when it ends. FlashInfer plans eager passes on the host, which has
to wait for that number then. SGLang waits before it prepares the next round at all, while the GPU idles; here the copy
to the host is only started then, and waited for where a plan needs it. Graphs plan on the GPU (`graph_plan`).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.overlap_utils import FutureMap


class LateLens(FutureMap):
    """`FutureMap` with `host_lens` in place of `batch.seq_lens_cpu`, which stays None in decode batches.

    Args:
        needs_cpu_seq_lens: whether an attention backend plans on the host.

    Attributes:
        plans_on_host: the same.
    """

    def __init__(
        self,
        device: Any,
        algorithm: Any,
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool,
        needs_confidence_relay: bool,
    ) -> None:
        super().__init__(
            device,
            algorithm,
            req_to_token_pool,
            needs_cpu_seq_lens=False,
            needs_confidence_relay=needs_confidence_relay,
        )
        self.plans_on_host = needs_cpu_seq_lens
        self._copied: Any = None

    def resolve_seq_lens_cpu(self, batch: Any, stream_ordered: bool = False) -> None:
        """Take the committed lengths from the last round, and start their copy to the host."""
        super().resolve_seq_lens_cpu(batch, stream_ordered)
        if not self.plans_on_host or batch.spec_info is None or batch.spec_info.future_indices is None:
            return
        stream = self.fwd_prepare_d2h_stream
        if stream is None or self.publish_ready is None:  # no GPU, or nothing is under way
            self.new_seq_lens_cpu_pinned = self.new_seq_lens_buf.cpu()
            return
        module = torch.get_device_module(self.device)
        stream.wait_event(self.publish_ready)
        with module.stream(stream):
            self.new_seq_lens_cpu_pinned.copy_(self.new_seq_lens_buf, non_blocking=True)
            self._copied = module.Event()
            self._copied.record()

    def host_lens(self, req_pool_indices_cpu: torch.Tensor) -> torch.Tensor:
        """Committed lengths of the requests of the batch resolved last, on the host; waits for the round before.

        Must be called before the batch's own round publishes lengths. req_pool_indices_cpu: [bs] -> [bs] int64.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        lens: torch.Tensor = self.new_seq_lens_cpu_pinned[req_pool_indices_cpu]
        return lens
