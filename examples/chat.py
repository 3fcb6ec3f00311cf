"""Chat through the OpenAI API: a streamed answer, then JSON that follows a schema. First: `make serve`."""

from __future__ import annotations

import json
import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
client = OpenAI(base_url=f"{URL}/v1", api_key="none")

question = (
    "Omar has 31 silver spoons. Clara brings 14 more. Omar gives 6 to Hugo. How many silver spoons does Omar have now?"
)
print(f"> {question}")
stream = client.chat.completions.create(
    model="default", messages=[{"role": "user", "content": question}], temperature=0, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)

schema = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
text = "The form is about Nina Fischer. They are 34 years old. They live in Lisbon."
print(f"\n\n> {text}")
reply = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": f"{text}\n\nReturn the data as JSON for this schema:\n{json.dumps(schema)}"}],
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    extra_body={"return_spec_tokens_details": True},
)
print(json.loads(reply.choices[0].message.content))
rounds = reply.model_extra["sglext"]["spec_tokens_details"]["spec_verify_ct"]
print(f"{reply.usage.completion_tokens} tokens in {rounds} draft-and-verify rounds")
