"""An answer that has to match a regular expression. First: `make serve`."""

from __future__ import annotations

import re
import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
PATTERN = r"(Monday|Tuesday|Wednesday|Thursday|Friday), ([01][0-9]|2[0-3]):[0-5][0-9], room [A-D][1-9]"
client = OpenAI(base_url=f"{URL}/v1", api_key="none")
question = "When and where do we meet? The meeting is on Thursday at 14:30 in room B7."
reply = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": question}],
    temperature=0,
    extra_body={"regex": PATTERN, "return_spec_tokens_details": True},
)
answer = reply.choices[0].message.content
assert re.fullmatch(PATTERN, answer)
print(f"> {question}\n{answer}")
rounds = reply.model_extra["sglext"]["spec_tokens_details"]["spec_verify_ct"]
print(f"{reply.usage.completion_tokens} tokens in {rounds} draft-and-verify rounds")
