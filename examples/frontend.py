"""A program in SGLang's frontend language: two answers that share one prompt. First: `make serve`."""

from __future__ import annotations

import sys
from typing import Any

import sglang as sgl

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
WORLD = (
    "Anna Weber is 41 years old and works as a pilot. Anna Weber lives in Prague. Anna Weber has a parrot called Leo. "
    "Anna Weber likes the colour red. The best friend of Anna Weber is Ivan Cook. Ivan Cook is 29 years old and works "
    "as a baker. Ivan Cook lives in Dublin. Ivan Cook has a rabbit called Rosa. Ivan Cook likes the colour blue. "
    "The best friend of Ivan Cook is Anna Weber. The city of Prague is in Bohemia. The city of Dublin is in Ireland."
)
NO_THINKING = "<think>\n\n</think>\n\n"  # what Qwen3's chat template writes before a direct answer


@sgl.function
def ask(s: Any, question: str) -> None:
    s += sgl.user(f"{WORLD}\n\n{question}")
    s += sgl.assistant(NO_THINKING + sgl.gen("answer", max_tokens=64))


sgl.set_default_backend(sgl.RuntimeEndpoint(URL, chat_template_name="qwen"))
questions = ["Where does Ivan Cook live?", "What is the job of Anna Weber?", "What pet does Ivan Cook have?"]
# The world is prefilled once; the other requests find it in the radix cache.
for question, state in zip(questions, ask.run_batch([{"question": q} for q in questions], temperature=0), strict=True):
    print(f"> {question}\n{state['answer']}")
