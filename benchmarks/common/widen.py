"""Turn nano into a checkpoint of a released shape that computes the same function: real acceptance at real cost.

    python -m benchmarks.common.widen 8B /tmp/wide-8b [--device cuda]

With r = wide / nano hidden size, by tiling:

- the residual stream holds r copies of nano's: the embedding's features and the output rows of `o_proj*` and
  `down_proj` are repeated, so its mean square, and with it every norm for the same eps, is nano's;
- norm weights are nano's followed by zeros, so every matrix reads the first copy alone and the rest of it is filler;
- heads, neurons and layers that nano lacks are random, and what they would write is zero. Query head i goes where it
  keeps its key-value head;
- vocabulary rows that nano lacks are the mean of its rows: their logit is the mean of its logits and never the largest.
  Their tokens are made-up words.

Sampled output differs, since the added rows take some probability. Matrix inputs are mostly zeros, which costs a GPU
as much time as other numbers do, but less power.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common.wide_tokenizer import widened_tokenizer
from sglang_orthrus.cli.demo import NANO

MAX_POSITIONS = 40960
VIEWS = ("", "_diff")
_FILLER_STD = 0.02
_WRITERS = 8

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Width:
    """What distinguishes the released shapes; head_dim is 128 in all of them, as in nano."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool
    kv_heads: int = 8
    vocab: int = 151936


SHAPES: Mapping[str, Width] = {
    "1.7B": Width(hidden=2048, intermediate=6144, layers=28, heads=16, tied=True),
    "4B": Width(hidden=2560, intermediate=9728, layers=36, heads=32, tied=True),
    "8B": Width(hidden=4096, intermediate=12288, layers=36, heads=32, tied=False),
}


class Widener:
    """Widens a dual-view Qwen3 checkpoint.

    Args:
        source: its directory.
        width: the shape to reach; its hidden size is a multiple of the source's.
        device: where filler is generated.

    Raises:
        ValueError: if the source does not fit into the shape.
    """

    def __init__(self, source: Path, width: Width, device: str = "cpu", seed: int = 0) -> None:
        self.config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
        self.width = width
        self._seed = seed
        self._device = device
        self._nano: Weights = {
            name: tensor.to(device)
            for file in sorted(source.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        self._hidden: int = self.config["hidden_size"]
        self._head_dim: int = self.config["head_dim"]
        too_small = [
            key
            for key, size in self._sizes().items()
            if isinstance(size, int) and not isinstance(size, bool) and size < self.config[key]
        ]
        if too_small or width.hidden % self._hidden or width.heads % width.kv_heads:
            raise ValueError(f"{source} does not fit into {width}: {too_small or 'hidden or heads do not divide'}")
        self._dtype = self._nano["model.norm.weight"].dtype

    def widened_config(self) -> dict[str, Any]:
        """The configuration of the result."""
        layers = self.width.layers
        return self.config | self._sizes() | {"layer_types": ["full_attention"] * layers, "max_window_layers": layers}

    def outer(self) -> Weights:
        """Embedding, final norm and head."""
        embedding = self._nano["model.embed_tokens.weight"]
        result = {
            "model.embed_tokens.weight": self._padded_vocab(embedding).repeat(1, self._copies),
            "model.norm.weight": self._norm(self._nano["model.norm.weight"]),
        }
        if not self.width.tied:
            head = embedding if self.config["tie_word_embeddings"] else self._nano["lm_head.weight"]
            result["lm_head.weight"] = self._reading(self._padded_vocab(head), self._generator(-1))
        return result

    def layer(self, index: int, views: Sequence[str] = VIEWS) -> Weights:
        """One layer's tensors: those of the AR view ("", with what both share), of the diffusion view, or both."""
        generator = self._generator(index, *views)
        result: Weights = {}
        for view in views:
            result |= self._attention(index, view, generator)
        if "" in views:
            result |= self._shared(index, generator)
        return {f"model.layers.{index}.{name}": tensor for name, tensor in result.items()}

    @property
    def _copies(self) -> int:
        return self.width.hidden // self._hidden

    def _sizes(self) -> dict[str, Any]:
        return {
            "hidden_size": self.width.hidden,
            "intermediate_size": self.width.intermediate,
            "num_hidden_layers": self.width.layers,
            "num_attention_heads": self.width.heads,
            "num_key_value_heads": self.width.kv_heads,
            "vocab_size": self.width.vocab,
            "tie_word_embeddings": self.width.tied,
            "max_position_embeddings": MAX_POSITIONS,
        }

    def _attention(self, index: int, view: str, generator: torch.Generator) -> Weights:
        queries = self._query_rows()
        keys = torch.arange(self.config["num_key_value_heads"] * self._head_dim)
        sizes = {"q": self.width.heads * self._head_dim, "k": self.width.kv_heads * self._head_dim}
        sizes["v"] = sizes["k"]
        result = {
            f"self_attn.{name}_proj{view}.weight": self._matrix(
                index, f"self_attn.{name}_proj{view}.weight", sizes[name], queries if name == "q" else keys, generator
            )
            for name in "qkv"
        }
        output = f"self_attn.o_proj{view}.weight"
        result[output] = self._writing(index, output, sizes["q"], queries)
        for name in "qk":
            norm = f"self_attn.{name}_norm{view}.weight"
            result[norm] = self._of(index, norm, lambda: self._ones(self._head_dim)).clone()
        return result

    def _shared(self, index: int, generator: torch.Generator) -> Weights:
        neurons = torch.arange(self.config["intermediate_size"])
        result = {
            name: self._matrix(index, name, self.width.intermediate, neurons, generator)
            for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight")
        }
        result["mlp.down_proj.weight"] = self._writing(index, "mlp.down_proj.weight", self.width.intermediate, neurons)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            result[name] = self._norm(self._of(index, name, lambda: self._ones(self._hidden)))
        return result

    def _of(self, index: int, name: str, otherwise: Callable[[], Tensor]) -> Tensor:
        found = self._nano.get(f"model.layers.{index}.{name}")
        return otherwise() if found is None else found

    def _matrix(self, index: int, name: str, rows: int, places: Tensor, generator: torch.Generator) -> Tensor:
        """[rows, wide hidden]: nano's rows at `places`, reading the first copy; filler elsewhere."""
        result = self._filler(rows, self.width.hidden, generator)
        found = self._nano.get(f"model.layers.{index}.{name}")
        if found is not None:
            result[places.to(self._device), : self._hidden] = found
        return result

    def _writing(self, index: int, name: str, columns: int, places: Tensor) -> Tensor:
        """[wide hidden, columns]: nano's columns at `places` and zeros elsewhere, the same for every copy."""
        result = torch.zeros(self._hidden, columns, dtype=self._dtype, device=self._device)
        found = self._nano.get(f"model.layers.{index}.{name}")
        if found is not None:
            result[:, places.to(self._device)] = found
        return result.repeat(self._copies, 1)

    def _reading(self, matrix: Tensor, generator: torch.Generator) -> Tensor:
        filler = self._filler(matrix.shape[0], self.width.hidden - self._hidden, generator)
        return torch.cat((matrix, filler), dim=1)

    def _norm(self, weight: Tensor) -> Tensor:
        return torch.cat((weight, weight.new_zeros(self.width.hidden - weight.shape[0])))

    def _padded_vocab(self, matrix: Tensor) -> Tensor:
        mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
        return torch.cat((matrix, mean.expand(self.width.vocab - matrix.shape[0], -1)))

    def _query_rows(self) -> Tensor:
        """Rows of nano's query heads in the wide matrix: each stays with its key-value head."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        group, wide_group = heads // kv_heads, self.width.heads // self.width.kv_heads
        if group > wide_group:
            raise ValueError(f"{group} query heads per key-value head do not fit into {wide_group}")
        places = torch.tensor([head // group * wide_group + head % group for head in range(heads)])
        return (places[:, None] * self._head_dim + torch.arange(self._head_dim)).flatten()

    def _generator(self, *key: int | str) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(zlib.crc32(repr((self._seed, *key)).encode()))

    def _filler(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        filler = torch.randn(rows, columns, dtype=self._dtype, device=self._device, generator=generator)
        return filler.mul_(_FILLER_STD)

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self._dtype, device=self._device)


def widen(source: Path, target: Path, width: Width, device: str = "cpu") -> Path:
    """Write the widened checkpoint, and return its directory.

    The views lie in separate files, so that `export_ar` of the result links instead of copying.
    """
    widener = Widener(source, width, device)
    target.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, Callable[[], Weights]] = {"model-ar-outer.safetensors": widener.outer}
    for index in range(width.layers):
        for view in VIEWS:
            name = f"model-{'diff' if view else 'ar'}-{index:03}.safetensors"
            jobs[name] = partial(widener.layer, index, (view,))

    def write(job: tuple[str, Callable[[], Weights]]) -> dict[str, str]:
        name, make = job
        weights = {key: tensor.cpu().contiguous() for key, tensor in make().items()}
        save_file(weights, target / name, metadata={"format": "pt"})
        return dict.fromkeys(weights, name)

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(_WRITERS) as pool:
        for names in pool.map(write, jobs.items()):
            weight_map |= names
    _write_json(target / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _write_json(target / "config.json", widener.widened_config())
    tokenizer = source / "tokenizer.json"
    if tokenizer.is_file():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        _write_json(target / tokenizer.name, widened_tokenizer(content, width.vocab))
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return target


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("target", type=Path)
    parser.add_argument("--source", type=Path, default=NANO)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    width = Width(**(asdict(shape) | {"layers": arguments.layers or shape.layers}))
    print(widen(arguments.source, arguments.target, width, arguments.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
