"""FlashInfer over blocks: CUDA graphs that hold several passes, and that plan themselves.

A plan is the host's schedule of a kernel's work, kept in its wrapper. It depends on the lengths, not on causality, so
draft and verify passes of one width run on the same plan.
"""

from __future__ import annotations

from typing import Any

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.runtime_context import get_spec

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.passes.attention import int_workspace_bytes
from sglang_orthrus.passes.plan_kernel import MIN_CHUNK, UNSPLIT, PlanLayout, max_split_work, write_plan

_ON_DEVICE = "SGLang plans on the device"


@depends_on(
    "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper.run",
    "q",
    "paged_kv_cache",
    "out",
    what="overridden: _cached_o_data_type is set, and an output that is not zeroed is passed",
    why="FlashInfer zeroes its own outputs, a fill kernel per layer and pass, and refuses others without that type",
    until="SGLang passes an output",
)
@depends_on(
    "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper.plan",
    "disable_split_kv",
    what="overridden, begin_forward, too: called with disable_split_kv under deterministic inference",
    why="SGLang leaves the splits of verify passes to FlashInfer, which decides by the whole batch",
    until="SGLang fixes them as it does for prefill and decode",
)
class BlockWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """FlashInfer's attention over blocks.

    Attributes:
        keeps_whole: whether each request is attended to in one go. Split as the batch allows, a request's sums would
            depend on its neighbours.
    """

    keeps_whole = False

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """As FlashInfer's."""
        if self.keeps_whole:
            kwargs["disable_split_kv"] = True
        super().plan(*args, **kwargs)

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: Any, *args: Any, **kwargs: Any) -> Any:
        """As FlashInfer's, into an output that is not zeroed: a plan covers it row by row."""
        self._cached_o_data_type = q.dtype  # SGLang plans without a type, and then no output is welcome
        return super().run(q, paged_kv_cache, *args, out=torch.empty_like(q), **kwargs)


@depends_on(
    "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend",
    "model_runner",
    what="subclassed; prefill_wrappers_verify is replaced; prefill_cuda_graph_metadata, cuda_graph_kv_indices, "
    "cuda_graph_qo_indptr, kv_indptr, indices_updater_prefill, kv_last_page_len, workspace_buffer, num_wrappers, "
    "prefill_backend, kv_index_translator and enable_deterministic are read",
    why="they hold the wrappers, shapes and buffers of the plans",
    until=_ON_DEVICE,
)
@depends_on(
    "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend._check_kv_attention_access",
    "phase",
    "access",
    what="called as the constructor does",
    why="the constructor leaves it out for subclasses",
    until="SGLang asks subclasses, too",
)
@depends_on(
    "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper",
    "float_workspace_buffer",
    what="subclassed; _plan_info is read and set; _int_workspace_buffer, _float_workspace_buffer, _paged_kv_indptr_buf "
    "and _paged_kv_indices_buf are written to by the graph's own plan",
    why="FlashInfer plans on the host",
    until="FlashInfer plans on the device",
)
class OrthrusFlashInferBackend(FlashInferAttnBackend):
    """SGLang's FlashInfer backend, whose graphs over blocks share wrappers and need no host before a replay.

    The plan at capture lays out the workspace and uploads what never changes. The first nodes of a graph write the rest
    from the lengths where they are.

    Args:
        model_runner: SGLang's, with its KV pool.
        options: as `FlashInferAttnBackend`'s.
    """

    plans_in_graphs = True
    # Read by SGLang's `decide_needs_cpu_seq_lens`; with it the overlap scheduler waits before it prepares a round.
    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any, **options: Any) -> None:
        super().__init__(model_runner, **options)
        self._width = int(get_spec().speculative_num_draft_tokens)
        for phase, name, access in (
            ("prefill", model_runner.prefill_attention_backend_str, self.prefill_kv_access),
            ("decode", model_runner.decode_attention_backend_str, self.decode_kv_access),
        ):
            if name == "flashinfer":
                self._check_kv_attention_access(phase, access)
        self.prefill_wrappers_verify = [
            BlockWrapper(self.workspace_buffer, "NHD", backend=self.prefill_backend) for _ in range(self.num_wrappers)
        ]
        for wrapper in self.prefill_wrappers_verify:
            wrapper.keeps_whole = self.enable_deterministic
        self._init_planner()

    def _init_planner(self) -> None:
        """What the plans in graphs need of the model's shape and of the device."""
        updater = self.indices_updater_prefill
        self._group = updater.num_qo_heads // updater.num_kv_heads
        num_sms = torch.cuda.get_device_properties(self.workspace_buffer.device).multi_processor_count
        self._max_work = max_split_work(num_sms, updater.num_kv_heads)
        self._kv_lens = torch.zeros_like(self.kv_last_page_len)

    @depends_on(
        "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.init_cuda_graph_state",
        "max_bs",
        "max_num_tokens",
        "kv_indices_buf",
        what="overridden: it allocates indices per request and no mask",
        why="it allocates a context's worth of indices and mask for every token of every block",
        until="SGLang sizes them by request",
    )
    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        """Allocate page indices for the requests that a graph can hold, and no mask.

        SGLang's backend allocates for every token of every block a context's worth of indices and of mask: at 128
        requests with blocks of 32 and a context of 40k, 0.8 GB.
        """
        if kv_indices_buf is None:
            columns = self.req_to_token_pool.req_to_token.shape[1]
            # The planner asks for room for each block twice.
            size = max_bs * columns + 2 * max_num_tokens
            kv_indices_buf = torch.zeros(size, dtype=torch.int32, device=self.workspace_buffer.device)
        super().init_cuda_graph_state(max_bs, 0, kv_indices_buf)

    @depends_on(
        "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend._create_prefill_wrappers",
        "bs",
        "use_custom_mask",
        what="overridden: the graphs of a batch size share wrappers",
        why="a second capture takes the first one's plan away",
        until="SGLang keeps wrappers per graph",
    )
    def _create_prefill_wrappers(self, bs: int, use_custom_mask: bool = False) -> list[Any]:
        """One set for all graphs of a batch size, so that one plan serves them all.

        SGLang makes new wrappers for every capture and plans for the newest alone: of two graphs of one size, the first
        would replay with the plan that it was captured with.
        """
        assert not use_custom_mask, "blocks are causal, or not masked at all"
        return self.prefill_cuda_graph_metadata.get(bs) or [
            self._graph_wrapper(bs, number) for number in range(self.num_wrappers)
        ]

    @depends_on(
        "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper.reset_workspace_buffer",
        "float_workspace_buffer",
        "int_workspace_buffer",
        what="called with integers for one batch size",
        why="a wrapper takes 8 MB of them on device and host, and every width has one per batch size",
        until="FlashInfer sizes them by what a plan needs",
    )
    def _graph_wrapper(self, bs: int, number: int) -> BlockWrapper:
        wrapper = BlockWrapper(
            self.workspace_buffer,
            "NHD",
            use_cuda_graph=True,
            backend=self.prefill_backend,
            qo_indptr_buf=self.cuda_graph_qo_indptr[number][: bs + 1],
            paged_kv_indptr_buf=self.kv_indptr[number][: bs + 1],
            paged_kv_indices_buf=self.cuda_graph_kv_indices[number],
            paged_kv_last_page_len_buf=self.kv_last_page_len[:bs],
        )
        size = int_workspace_bytes(bs, self._width, self._group, self._max_work)
        device = self.workspace_buffer.device
        wrapper.reset_workspace_buffer(self.workspace_buffer, torch.empty(size, dtype=torch.uint8, device=device))
        return wrapper

    @depends_on(
        "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.init_forward_metadata_out_graph",
        "forward_batch",
        "in_capture",
        what="overridden: it plans at capture only",
        why="its plan needs the lengths on the host, so that every round would wait for them",
        until=_ON_DEVICE,
    )
    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Nothing is left to do before a graph over blocks replays."""
        is_block = forward_batch.forward_mode.is_target_verify()
        if in_capture or not is_block:
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            if is_block and self.enable_deterministic:
                self._fix_tiles(forward_batch)

    @depends_on(
        "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.init_forward_metadata_in_graph",
        "forward_batch",
        what="overridden: the first nodes of a graph write its plan",
        why="its plan needs the lengths on the host, so that every round would wait for them",
        until=_ON_DEVICE,
    )
    @depends_on(
        "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator.pack_read_stream",
        "plan",
        "req_pool_indices",
        "seq_lens",
        "indptr",
        "out",
        "num_token_blocks",
        what="called inside the graph for the page indices of its plan",
        why="SGLang's backend packs them outside",
        until=_ON_DEVICE,
    )
    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """The first nodes of a graph over blocks: its plan and page indices."""
        if not forward_batch.forward_mode.is_target_verify():
            super().init_forward_metadata_in_graph(forward_batch)
            return
        bs = forward_batch.batch_size
        wrapper = self.prefill_cuda_graph_metadata[bs][0]
        kv_lens, kv_indptr = self._kv_lens[:bs], wrapper._paged_kv_indptr_buf
        write_plan(
            wrapper._int_workspace_buffer,
            PlanLayout(*wrapper._plan_info),
            forward_batch.seq_lens[:bs],
            kv_lens,
            kv_indptr,
            width=forward_batch.spec_info.draft_token_num,
            group=self._group,
            max_work=self._max_work,
            min_chunk=UNSPLIT if self.enable_deterministic else MIN_CHUNK,
        )
        self.kv_index_translator.pack_read_stream(
            forward_batch.kv_loc_plan,
            req_pool_indices=forward_batch.req_pool_indices[:bs],
            seq_lens=kv_lens,
            indptr=kv_indptr,
            out=wrapper._paged_kv_indices_buf,
            num_token_blocks=None,
        )

    @depends_on(
        "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper.plan",
        what="the call of _cached_module with _pin_memory_int_workspace_buffer is made here, with uniform_q_len",
        why="the wrapper has no argument for uniform_q_len, and without it the batch decides the tiles",
        until="FlashInfer's wrapper takes uniform_q_len",
    )
    def _fix_tiles(self, forward_batch: Any) -> None:
        """Lay the workspace out anew, for tiles that fit one block whatever the batch, as in passes without a graph.

        FlashInfer takes the tile for the most rows that one of the requests could have, unless it is told that all have
        as many: with two query heads per key-value head blocks of 32 get tiles of 64 rows alone and of 128 otherwise,
        and the tile decides the order of the sums.
        """
        bs, width = forward_batch.batch_size, forward_batch.spec_info.draft_token_num
        wrapper = self.prefill_cuda_graph_metadata[bs][0]
        rows = torch.arange(0, (bs + 1) * width, width, dtype=torch.int32)
        lens = torch.full((bs,), width, dtype=torch.int32)
        updater = self.indices_updater_prefill
        wrapper._plan_info = wrapper._cached_module.plan(
            wrapper._float_workspace_buffer,
            wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer,
            rows,
            rows,
            lens,
            bs * width,
            bs,
            updater.num_qo_heads,
            updater.num_kv_heads,
            1,  # page size
            True,  # is_cuda_graph_enabled
            updater.head_dim,
            updater.head_dim,
            False,  # causal, which plans ignore
            -1,  # window_left
            -1,  # fixed_split_size
            False,  # disable_split_kv
            0,  # num_colocated_ctas
            width,  # uniform_q_len
        )
