"""Batch generation without a server: sgl.Engine with ORTHRUS on the bundled checkpoint, or on the one you name."""

from __future__ import annotations

import sys
from pathlib import Path

import sglang as sgl

import sglang_orthrus

NANO = Path(sglang_orthrus.__file__).with_name("nano")
QUESTIONS = ["What is 47 + 85?", "What is 38 + 14 - 21 + 6?", "What is 63 * 7?", "Tell me about yourself."]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(NANO)
    engine = sgl.Engine(model_path=model, speculative_algorithm="ORTHRUS", log_level="error")
    render = engine.tokenizer_manager.tokenizer.apply_chat_template
    prompts = [
        render([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        for question in QUESTIONS
    ]
    replies = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 200})
    for question, reply in zip(QUESTIONS, replies, strict=True):
        meta = reply["meta_info"]
        print(f"> {question}\n{reply['text']}")
        print(f"  ({meta['completion_tokens']} tokens in {meta.get('spec_verify_ct', 0)} rounds)\n")
    engine.shutdown()


if __name__ == "__main__":  # the engine starts its processes by importing this file again
    main()
