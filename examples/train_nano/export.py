"""Writes a training checkpoint as a servable one: `python -m examples.train_nano.export runs/diff`."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from examples.train_nano import checkpoint
from examples.train_nano.model import NanoConfig, OrthrusLM
from examples.train_nano.tokenizer import END_OF_TEXT, END_OF_TURN, TOKENIZER_DIR, load_tokenizer

NANO_DIR = Path(__file__).resolve().parents[2] / "sglang_orthrus" / "nano"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def export(model: OrthrusLM, folder: Path, tokenizer_dir: Path = TOKENIZER_DIR) -> None:
    """Writes config, bf16 weights, tokenizer, chat template, generation config into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_dir / name, folder / name)
    tokenizer = load_tokenizer(tokenizer_dir)
    stop_ids = [tokenizer.token_to_id(token) for token in (END_OF_TURN, END_OF_TEXT)]
    shape = asdict(model.config)
    config = {
        "architectures": ["OrthrusLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        **shape,
        "rope_parameters": {"rope_theta": shape["rope_theta"], "rope_type": "default"},
        "layer_types": ["full_attention"] * model.config.num_hidden_layers,
        "max_window_layers": model.config.num_hidden_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": stop_ids[0],
        "pad_token_id": stop_ids[1],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Greedy for clients that name no temperature; no top_k, which would also bind clients that name one.
    greedy = {"do_sample": False, "temperature": 0.0}
    generation = {**greedy, "eos_token_id": stop_ids, "pad_token_id": stop_ids[1]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {name: p.detach().cpu().bfloat16().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load_exported(folder: Path) -> OrthrusLM:
    """The model of an exported folder, its bf16 weights as fp32."""
    config = json.loads((folder / "config.json").read_text())
    model = OrthrusLM(NanoConfig(**{name: config[name] for name in NanoConfig.__dataclass_fields__}))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a folder that train.py wrote")
    parser.add_argument("--out", type=Path, default=NANO_DIR)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER_DIR)
    args = parser.parse_args()
    model, progress = checkpoint.load_model(args.checkpoint)
    export(model, args.out, args.tokenizer)
    # The history of the stage goes along, for the model card.
    (args.out / f"training_{progress.stage}.json").write_text(
        json.dumps({"settings": progress.settings, "history": progress.history}, indent=1) + "\n"
    )
    size = sum(path.stat().st_size for path in args.out.iterdir())
    exported = load_exported(args.out)
    for (name, saved), p in zip(exported.named_parameters(), model.parameters(), strict=True):
        if not torch.equal(saved, p.bfloat16().float()):
            raise AssertionError(f"{name} differs after export")
    print(f"wrote {args.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
