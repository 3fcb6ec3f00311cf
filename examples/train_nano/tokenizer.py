"""Trains the byte-level BPE tokenizer of orthrus-nano on the corpus: `python -m examples.train_nano.tokenizer`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.train_nano.chat_format import TEMPLATE_PATH, sample_prompt
from examples.train_nano.corpus import train_sample

TOKENIZER_DIR = Path(__file__).resolve().parent / "tokenizer"
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 4096
END_OF_TEXT, START_OF_TURN, END_OF_TURN, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
# As in Qwen3 these are tokens of their own but not special: decoding keeps them, and parsers look for them.
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
MASK_ID = VOCAB_SIZE - 1
# Qwen's cut (words, single digits, runs of punctuation, white space), except that a word with a capital never
# carries the space before it: a name is then spelt with the same tokens in a sentence and within quotes.
SPLIT = r" ?\p{Ll}+|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def corpus_text(num_samples: int, seed: int = 0) -> Iterator[str]:
    """Rendered training samples, prompts with their answers."""
    for index in range(num_samples):
        sample = train_sample(seed, index)
        yield sample_prompt(sample) + sample.answer


def train_tokenizer(num_samples: int) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE rows; the mask token has the last one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL) + len(TAGS) + 1
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_text(num_samples), trainer)
    missing = VOCAB_SIZE - added - tokenizer.get_vocab_size()
    if missing:
        raise ValueError(f"the corpus sample gives {missing} merges too few: raise --samples")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
    assert tokenizer.token_to_id(MASK) == MASK_ID
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for `AutoTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "extra_special_tokens": {},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE_PATH.read_text())


def load_tokenizer(folder: Path = TOKENIZER_DIR) -> Tokenizer:
    """The fast tokenizer alone, without transformers."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    """Command line: trains and saves the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=60_000, help="training samples to read")
    parser.add_argument("--out", type=Path, default=TOKENIZER_DIR)
    args = parser.parse_args()
    save_tokenizer(train_tokenizer(args.samples), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
