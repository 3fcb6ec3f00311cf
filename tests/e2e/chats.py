"""Chat requests, whole and streamed, and what a client reads of their answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import requests

from sglang_orthrus.cli.server import Server

CHAT = "/v1/chat/completions"


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The decoded events of a stream."""
    with requests.post(server.url + path, json={**body, "stream": True}, stream=True, timeout=120) as response:
        response.raise_for_status()
        return [
            json.loads(line.removeprefix(b"data: ")) for line in response.iter_lines() if line.startswith(b"data: {")
        ]


def chat(server: Server, request: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = server.post(CHAT, {"model": "default", "temperature": 0, **request})
    return answer


def content(message: dict[str, Any]) -> dict[str, Any]:
    """What a client reads of a message; the ids of tool calls are random."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
    return {
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or "",
        "calls": calls,
    }


def assembled(stream: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The messages that the deltas of a chat stream make, by choice; every call must come with an id."""
    messages: dict[int, dict[str, Any]] = defaultdict(lambda: {"content": "", "reasoning": "", "calls": []})
    for choice in (choice for event in stream for choice in event["choices"]):
        message, delta = messages[choice["index"]], choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or []:
            if call["function"].get("name"):
                assert call["id"] and call["index"] == len(message["calls"])
                message["calls"].append((call["function"]["name"], ""))
            name, arguments = message["calls"][call["index"]]
            message["calls"][call["index"]] = (name, arguments + (call["function"].get("arguments") or ""))
        if choice["finish_reason"]:
            message["finish"] = choice["finish_reason"]
    return dict(messages)
