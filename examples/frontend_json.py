"""A program in SGLang's frontend language with constrained parts: JSON by schema, then a date. First: `make serve`."""

from __future__ import annotations

import json
import sys
from typing import Any

import sglang as sgl

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
NO_THINKING = "<think>\n\n</think>\n\n"  # what Qwen3's chat template writes before a direct answer
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
        "required": ["name", "age", "city"],
        "additionalProperties": False,
    }
)


@sgl.function
def read_form(s: Any, text: str) -> None:
    s += sgl.user(f"{text}\n\nReturn the data as JSON for this schema:\n{SCHEMA}")
    s += sgl.assistant(NO_THINKING + sgl.gen("form", max_tokens=64, json_schema=SCHEMA))
    s += sgl.user("On which date is the appointment?")
    s += sgl.assistant(NO_THINKING + sgl.gen("date", max_tokens=16, regex=r"20[0-9]{2}-[01][0-9]-[0-3][0-9]"))


sgl.set_default_backend(sgl.RuntimeEndpoint(URL, chat_template_name="qwen"))
texts = [
    "The form is about Nina Fischer. They are 34 years old. They live in Lisbon. The appointment is on 2027-03-14.",
    "The form is about Omar Klein. They are 51 years old. They live in Prague. The appointment is on 2026-11-02.",
]
for text, state in zip(texts, read_form.run_batch([{"text": text} for text in texts], temperature=0), strict=True):
    print(f"> {text}\n{json.loads(state['form'])} on {state['date']}")
