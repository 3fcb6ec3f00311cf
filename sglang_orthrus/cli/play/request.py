"""What the page may ask for. Pure: everything that comes from a browser is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 4096
_TEXTS = ("system", "prompt", "schema")


@dataclass(frozen=True)
class Question:
    """One request, the same for both servers. It is greedy, so that both answers must be equal.

    Attributes:
        schema: as typed; SGLang says what is wrong with it. Empty for none.
        tools: as in the OpenAI API; SGLang says what is wrong with them.
    """

    prompt: str
    system: str = ""
    schema: str = ""
    tools: tuple[Any, ...] = ()
    max_tokens: int = 256
    is_thinking: bool = False

    @classmethod
    def parse(cls, body: Any) -> Question:
        """From a JSON body.

        Raises:
            ValueError: a sentence that names the field.
        """
        if not isinstance(body, Mapping):
            raise ValueError("the request must be a JSON object")
        texts = {name: body.get(name, "") for name in _TEXTS}
        for name, value in texts.items():
            if not isinstance(value, str):
                raise ValueError(f"{name} must be text")
        if not texts["prompt"].strip():
            raise ValueError("the message is empty: type one, or choose an example")
        tools = body.get("tools", [])
        if not isinstance(tools, list):
            raise ValueError("tools must be a JSON array")
        max_tokens = body.get("max_tokens", cls.max_tokens)
        if type(max_tokens) is not int or not 1 <= max_tokens <= MOST_TOKENS:
            raise ValueError(f"the number of tokens must be a whole number from 1 to {MOST_TOKENS}")
        return cls(**texts, tools=tuple(tools), max_tokens=max_tokens, is_thinking=body.get("thinking") is True)

    def tokenize_body(self) -> dict[str, Any]:
        """For `/tokenize`, which applies the chat template."""
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return {
            "messages": [*system, {"role": "user", "content": self.prompt}],
            "chat_template_kwargs": {"enable_thinking": self.is_thinking},
            **({"tools": list(self.tools)} if self.tools else {}),
        }

    def generate_body(self, ids: list[int]) -> dict[str, Any]:
        """For `/generate`, which streams token ids with the text."""
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": self.max_tokens}
        if self.has_schema:
            sampling["json_schema"] = self.schema
        return {"input_ids": ids, "stream": True, "sampling_params": sampling}

    @property
    def has_schema(self) -> bool:
        """Whether a grammar constrains the answer."""
        return bool(self.schema.strip())
