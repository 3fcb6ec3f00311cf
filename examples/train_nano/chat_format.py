"""Conversations as text: the chat template in Jinja for clients, and the same in Python for fast data generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.train_nano.sample import Message, Sample

TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
END_OF_TURN = "<|im_end|>"
TOOLS_HEAD = (
    "# Tools\n\nYou can call the functions whose signatures are listed within <tools></tools>, "
    "one JSON object per line:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nTo call a function, write a JSON object with its name and arguments within "
    '<tool_call></tool_call>:\n<tool_call>\n{"name": "function", "arguments": {"argument": "value"}}\n</tool_call>'
)


def tool_line(tool: dict[str, Any]) -> str:
    """One tool as the template lists it: name, description, parameters, in this order."""
    function = tool.get("function", tool)
    parts = {key: function.get(key) for key in ("name", "description", "parameters")}
    return json.dumps(parts, ensure_ascii=False)


def _assistant(message: Message) -> str:
    content = (message.get("content") or "").split("</think>")[-1].lstrip("\n")
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(([content] if content else []) + calls)


def render_prompt(messages: list[Message], tools: list[dict[str, Any]] | None = None, thinking: bool = False) -> str:
    """The prompt up to where the assistant begins to write; equals the Jinja template's output."""
    out = []
    system = None
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if tools:
        head = f"{system}\n\n" if system else ""
        lines = "".join("\n" + tool_line(tool) for tool in tools)
        out.append(f"<|im_start|>system\n{head}{TOOLS_HEAD}{lines}{TOOLS_TAIL}<|im_end|>\n")
    elif system is not None:
        out.append(f"<|im_start|>system\n{system}<|im_end|>\n")
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            first = i == 0 or messages[i - 1]["role"] != "tool"
            last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            out.append("<|im_start|>user" if first else "")
            out.append(f"\n<tool_response>\n{message['content']}\n</tool_response>")
            out.append("<|im_end|>\n" if last else "")
        else:
            text = _assistant(message) if role == "assistant" else message["content"]
            out.append(f"<|im_start|>{role}\n{text}<|im_end|>\n")
    out.append("<|im_start|>assistant\n")
    if not thinking:
        out.append("<think>\n\n</think>\n\n")
    return "".join(out)


def sample_prompt(sample: Sample) -> str:
    """The rendered prompt of a sample."""
    return render_prompt(sample.messages, sample.tools, sample.thinking)
