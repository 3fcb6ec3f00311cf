"""Quick looks at held-out rows during training, teacher-forced: exact answers (AR), draft lengths (diffusion)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.train_nano.corpus import FAMILIES, held_out
from examples.train_nano.losses import Inputs
from examples.train_nano.pack import ANSWER, Rows, pack
from examples.train_nano.tokenizer import load_tokenizer

PROBE_SEED = 7


def to_device(rows: Rows, device: torch.device) -> Inputs:
    """Packed rows as int64 tensors on the device."""

    def move(array: NDArray[np.generic]) -> Tensor:
        narrow = torch.from_numpy(array.astype(np.int16) if array.dtype == np.uint16 else array)
        if device.type == "cuda":
            narrow = narrow.pin_memory()
        return narrow.to(device, non_blocking=True).long()

    return Inputs(move(rows.ids), move(rows.docs), move(rows.positions), move(rows.kinds))


def held_out_rows(tokenizer_dir: Path, num_rows: int, length: int) -> Rows:
    """`num_rows` rows of held-out conversations, all families alike (a seed apart from the evaluation's)."""
    per_family = 4
    while True:
        samples = [sample for family in FAMILIES for sample in held_out(family, per_family, PROBE_SEED)]
        samples = [samples[i] for i in np.random.default_rng(0).permutation(len(samples))]
        rows = pack(samples, load_tokenizer(tokenizer_dir), length)
        if rows.count >= num_rows:
            return rows.part(0, num_rows)
        per_family *= 2


def exact_shares(rows: Rows, correct: NDArray[np.bool_]) -> dict[str, float]:
    """Share of answers whose every token is the greedy choice, per family. correct [rows, length-1]."""
    label = (rows.kinds[:, 1:] == ANSWER) & (rows.docs[:, 1:] == rows.docs[:, :-1])
    counts: dict[str, list[int]] = {family: [] for family in FAMILIES}
    for row in range(rows.count):
        for doc in range(1, int(rows.docs[row].max()) + 1):
            mine = label[row] & (rows.docs[row, 1:] == doc)
            if mine.any():
                family = FAMILIES[int(rows.families[row, 1:][mine][0])]
                counts[family].append(int(correct[row][mine].all()))
    return {family: float(np.mean(hits)) for family, hits in counts.items() if hits}


def run_means(rows: Rows, at: NDArray[np.int64], valid: NDArray[np.bool_], runs: NDArray[np.int64]) -> dict[str, float]:
    """Mean tokens per cycle (accepted drafts + 1) over random anchors, per family. All arrays [rows, n]."""
    family = np.take_along_axis(rows.families.astype(np.int64), at, axis=1)
    means = {}
    for index, name in enumerate(FAMILIES):
        mine = valid & (family == index)
        if mine.any():
            means[name] = float(runs[mine].mean() + 1)
    return means
