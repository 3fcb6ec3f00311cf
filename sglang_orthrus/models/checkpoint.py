"""File-level tools for dual-view checkpoints: tensor names, and the AR-only export."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

DIFF_SUFFIXES = (
    "q_proj_diff.weight",
    "k_proj_diff.weight",
    "v_proj_diff.weight",
    "o_proj_diff.weight",
    "q_norm_diff.weight",
    "k_norm_diff.weight",
)
# What a quantised projection has in place of its weight, or beside it: GPTQ and AWQ, compressed-tensors, fp8.
_QUANTISED = frozenset(
    (
        *("qweight", "qzeros", "scales", "g_idx", "bias"),
        *("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"),
        *("weight_scale_inv", "input_scale"),
    )
)
INDEX = "model.safetensors.index.json"
_DUAL_VIEW_KEYS = ("block_size", "mask_token_id", "auto_map")
_SHOWN = 4


def diff_tensor_names(num_layers: int) -> frozenset[str]:
    """Names of the diffusion view's tensors: six per layer, as the released checkpoints name them."""
    return frozenset(
        f"model.layers.{layer}.self_attn.{suffix}" for layer in range(num_layers) for suffix in DIFF_SUFFIXES
    )


def plain_name(name: str) -> str:
    """A tensor's name; of a quantised `*_diff` projection's tensor, the name of the weight that it stands for."""
    layer, _, parameter = name.rpartition(".")
    return f"{layer}.weight" if layer.endswith("_proj_diff") and parameter in _QUANTISED else name


def check_tensors(names: Iterable[str], num_layers: int) -> None:
    """Check that the `*_diff` tensors among `names` are those that `num_layers` layers need, quantised or not.

    Raises:
        ValueError: naming the missing and the unexpected ones (the first few, and how many).
    """
    found = {plain_name(name) for name in names if "_diff." in name}
    expected = diff_tensor_names(num_layers)
    problems = [
        f"{len(wrong)} {label} ({_first_few(wrong)})"
        for label, wrong in (("missing", expected - found), ("unexpected", found - expected))
        if wrong
    ]
    if problems:
        raise ValueError(
            f"the checkpoint's diffusion view does not fit its {num_layers} layers: "
            + "; ".join(problems)
            + f". An Orthrus checkpoint has {len(DIFF_SUFFIXES)} *_diff tensors per layer; "
            "download it again, or serve it without --speculative-algorithm ORTHRUS."
        )


def folder_problem(path: str | Path, num_layers: int) -> str | None:
    """Why a directory can't replace the weights of an Orthrus model with `num_layers` layers; None if it can.

    What is no directory, such as a name on the Hub, is not looked at.
    """
    if not Path(path).is_dir():
        return None
    try:
        check_tensors(tensor_names(path), num_layers)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


def tensor_names(path: str | Path) -> frozenset[str]:
    """Tensor names of a local checkpoint directory, read from its index or its files' headers.

    Raises:
        FileNotFoundError: if the directory holds no safetensors file.
    """
    folder = Path(path)
    index = folder / INDEX
    if index.is_file():
        return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return frozenset(name for file in weight_files(folder) for name in names_in(file))


def export_ar(source: str | Path, target: str | Path) -> Path:
    """Write the AR view of a dual-view checkpoint as a plain Qwen3 checkpoint, and return its directory.

    The `*_diff` tensors and the dual-view configuration keys are left out; every other file (tokenizer, chat
    template, generation config) is copied. Weight files without such tensors are hard-linked where the file system
    allows it. The result is the model that `source` must reproduce.

    Raises:
        FileNotFoundError: if `source` is not a checkpoint directory.
        FileExistsError: if `target` already holds a configuration.
    """
    source, target = Path(source), Path(target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    files = weight_files(source)
    if (target / "config.json").exists():
        raise FileExistsError(f"{target} already holds a checkpoint; choose another directory")
    target.mkdir(parents=True, exist_ok=True)

    weight_map: dict[str, str] = {}
    for file in files:
        names = names_in(file)
        kept = {name for name in names if "_diff." not in name}
        if kept == names:
            link_or_copy(file, target / file.name)
        elif kept:
            save_file(_tensors(file, kept), target / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, file.name)
    if len(files) > 1:
        write_json(target / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(target / "config.json", _ar_config(config))
    for file in source.iterdir():
        if file.is_file() and not is_model_file(file):
            shutil.copyfile(file, target / file.name)
    return target


def _ar_config(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _DUAL_VIEW_KEYS}
    return kept | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def _tensors(file: Path, names: Iterable[str]) -> dict[str, Any]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in names}


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it."""
    try:
        target.hardlink_to(source.resolve())  # not to a link, such as those of the hub's cache
    except OSError:
        shutil.copyfile(source, target)


def is_model_file(file: Path) -> bool:
    """Whether a file of a checkpoint belongs to its weights or its views, rather than to its tokenizer."""
    # The model card describes the dual-view model, modeling_*.py implements it: neither fits the export.
    return file.name in ("config.json", INDEX, "README.md") or file.suffix in (".safetensors", ".py")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a directory.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {folder}")
    return files


def names_in(file: Path) -> set[str]:
    """Of a safetensors file's tensors, from its JSON header: an 8-byte little-endian length, then the text."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return set(header) - {"__metadata__"}


def _first_few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As Transformers formats it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
