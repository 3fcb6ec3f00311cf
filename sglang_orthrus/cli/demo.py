"""`python -m sglang_orthrus demo`: the bundled checkpoint with and without ORTHRUS, side by side."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletion

from sglang_orthrus.cli.server import Server

NANO = Path(__file__).parents[1] / "nano"
ORTHRUS_ARGS = ("--speculative-algorithm", "ORTHRUS")
SERVER_ARGS = ("--tool-call-parser", "qwen25")
_REPEATS = 5
_STATS = {"return_spec_tokens_details": True, "return_output_ids_in_sglext": True}

_SCHEMA = {
    "type": "object",
    "properties": {
        "customer": {"type": "string"},
        "item": {"type": "string"},
        "quantity": {"type": "integer"},
        "delivery_city": {"type": "string"},
        "due_date": {"type": "string"},
        "is_gift": {"type": "boolean"},
    },
    "required": ["customer", "item", "quantity", "delivery_city", "due_date", "is_gift"],
    "additionalProperties": False,
}
_ORDER = (
    "The customer is Grace Novak. The ordered product is a copper lantern. The customer wants 12 pieces. "
    "It ships to Vienna. It is due on 2027-03-14. It should be wrapped as a gift."
)


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


_TOOLS = [
    _tool("get_weather", "Get the current weather of a city.", city="string"),
    _tool("book_flight", "Book a flight.", origin="string", destination="string", date="string"),
    _tool("set_alarm", "Set an alarm.", time="string"),
]

REQUESTS: dict[str, dict[str, Any]] = {
    "chat": {
        "messages": [
            {
                "role": "user",
                "content": "Nina has 42 copper lanterns. Omar brings 17 more. Nina gives 9 to Clara. "
                "Hugo brings 21 more. How many copper lanterns does Nina have now?",
            }
        ]
    },
    "json": {
        "messages": [
            {
                "role": "user",
                "content": f"{_ORDER}\n\nReturn the data as JSON for this schema:\n{json.dumps(_SCHEMA)}",
            }
        ],
        "response_format": {"type": "json_schema", "json_schema": {"name": "order", "schema": _SCHEMA}},
    },
    "tool": {
        "messages": [{"role": "user", "content": "Book a flight from Oslo to Madrid on 2027-05-02."}],
        "tools": _TOOLS,
    },
    "story": {
        "messages": [{"role": "user", "content": "Write a short story about Elena at the harbour and a wooden flute."}]
    },
}


@dataclass(frozen=True)
class Measurement:
    """One request on one server."""

    output_ids: list[int]
    cycles: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.output_ids) / self.seconds

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens per draft-and-verify round, bonus included; the prefill yields the first token by itself."""
        return (len(self.output_ids) - 1) / self.cycles if self.cycles else 1.0


def run() -> int:
    """Show the demo, and return the exit status: 1 if speculation changed any output."""
    say(f"orthrus-nano, a real but tiny dual-view model, from {NANO}")
    with served("ORTHRUS", *ORTHRUS_ARGS) as client:
        show(client)
        fast = measure_all(client)
    with served("no speculation") as client:
        plain = measure_all(client)
    say(table(fast, plain))
    identical = all(fast[name].output_ids == plain[name].output_ids for name in REQUESTS)
    if not identical:
        print("The outputs differ: this is a bug, please report it.", file=sys.stderr)
    return 0 if identical else 1


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def served(label: str, *args: str) -> Iterator[OpenAI]:
    """A client of a server of the bundled checkpoint; the waiting is shown on one line where there is a terminal."""
    with Server(NANO, *SERVER_ARGS, *args, progress=Waiting(label)) as server:
        say(f"{clear_line()}server up ({label}): {server.url}  log: {server.log_path}")
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)


def clear_line() -> str:
    """What erases a progress line; nothing where output is not a terminal."""
    return "\r\033[K" if sys.stdout.isatty() else ""


class Waiting:
    """Progress of a starting server: one line, rewritten on a terminal, repeated every ten seconds elsewhere."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.last_shown = -10.0

    def __call__(self, seconds: float, line: str) -> None:
        message = line.split("] ", 1)[-1][:60]
        text = f"starting the server ({self.label}), usually under a minute ... {seconds:.0f} s  {message}"
        if sys.stdout.isatty():
            print(f"{clear_line()}{text[:110]}", end="", flush=True)
        elif seconds - self.last_shown >= 10:
            self.last_shown = seconds
            say(text)


def show(client: OpenAI) -> None:
    """The three kinds of requests, as a user would make them."""
    say(f"\n--- chat, streamed\n> {REQUESTS['chat']['messages'][0]['content']}")
    for chunk in client.chat.completions.create(model="default", stream=True, **REQUESTS["chat"]):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    say(f"\n\n--- JSON schema\n> {_ORDER}")
    answer = client.chat.completions.create(model="default", **REQUESTS["json"]).choices[0].message.content
    say(json.dumps(json.loads(answer), indent=2))
    say(f"\n--- tool call\n> {REQUESTS['tool']['messages'][0]['content']}")
    for call in client.chat.completions.create(model="default", **REQUESTS["tool"]).choices[0].message.tool_calls or []:
        say(f"{call.function.name}({call.function.arguments})")
    say("")


def measure_all(client: OpenAI) -> dict[str, Measurement]:
    """Every request once for warm-up, then `_REPEATS` times; the median time is kept."""
    return {name: measure(client, request) for name, request in REQUESTS.items()}


def measure(client: OpenAI, request: dict[str, Any]) -> Measurement:
    seconds: list[float] = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        response = client.chat.completions.create(model="default", extra_body=_STATS, **request)
        seconds.append(time.perf_counter() - started)
    output_ids, cycles = statistics_of(response)
    return Measurement(output_ids, cycles, statistics.median(seconds[1:]))


def statistics_of(response: ChatCompletion) -> tuple[list[int], int]:
    """Token ids and number of verify passes, from SGLang's extension of the OpenAI answer."""
    extension: dict[str, Any] = (response.model_extra or {})["sglext"]
    details = extension.get("spec_tokens_details") or {}
    return extension["output_ids"][0], details.get("spec_verify_ct", 0)


def table(fast: dict[str, Measurement], plain: dict[str, Measurement]) -> str:
    """The comparison as aligned text."""
    rows = [("request", "identical", "tokens", "tokens/cycle", "tok/s plain", "tok/s ORTHRUS", "speed-up")]
    for name, measured in fast.items():
        baseline = plain[name]
        rows.append(
            (
                name,
                "yes" if measured.output_ids == baseline.output_ids else "NO",
                str(len(measured.output_ids)),
                f"{measured.tokens_per_cycle:.1f}",
                f"{baseline.tokens_per_second:.0f}",
                f"{measured.tokens_per_second:.0f}",
                f"{baseline.seconds / measured.seconds:.1f}x",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n" + "\n".join(lines) + f"\nmedian of {_REPEATS} runs after a warm-up, one request at a time"
