"""Text and tool calls come out of a stream whole, however many of them lie in one chunk."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.base_format_detector import BaseFormatDetector
from sglang.srt.function_call.function_call_parser import FunctionCallParser

from sglang_orthrus.compat.streaming import parse_tool_calls_word_by_word
from tests.contract.tool_texts import KINDS, Call, text_of
from tests.patching import PATCHES, apply, load

pytestmark = pytest.mark.contract

CALLS = [("look", {"at": "sea"}), ("look", {"at": "{sky}"}), ("go", {})]
TEXT = "Well. " + "\n".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    for name, arguments in CALLS
)
CODE = 'def f(x):\n    return [x, "\\\\", {1: (x-1)}] if x < 3 else "é"\n'
SIZES = [1, 7, 40, len(TEXT) - 60, len(TEXT)]


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own, which a test before this one may have wrapped by resolving arguments."""
    for name in ("parse_stream_chunk", "parse_stream_end"):
        monkeypatch.setattr(FunctionCallParser, name, inspect.unwrap(getattr(FunctionCallParser, name)))


@pytest.fixture
def wrapped(stock: None) -> None:
    parse_tool_calls_word_by_word()


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = apply(PATCHES / "0007-tool-calls-of-one-chunk.patch", tmp_path)
    base, parser, hermes = (load(f"patched_{copy.stem}", copy) for copy in copies)
    for owner, name, module in [
        (BaseFormatDetector, "parse_streaming_increment", base),
        (FunctionCallParser, "parse_stream_chunk", parser),
    ]:
        monkeypatch.setattr(owner, name, getattr(getattr(module, owner.__name__), name))
    monkeypatch.setitem(FunctionCallParser.ToolCallParserEnum, "hermes", hermes.HermesDetector)


class Counting:
    """A parser that counts what its detector parses: the text that it holds, at every call."""

    def __init__(self, kind: str) -> None:
        tools = [Tool(function=Function(name=name, parameters={"type": "object"})) for name in ("look", "go")]
        self.parser = FunctionCallParser(tools, kind)
        self.calls = self.characters = 0
        detector = self.parser.detector
        parse = detector.parse_streaming_increment

        def counted(text: str, tools: list[Tool]) -> Any:
            self.calls += 1
            self.characters += len(detector._buffer) + len(text)
            return parse(text, tools)

        detector.parse_streaming_increment = counted

    def stream(self, chunks: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
        """All text, and every call's name and arguments; a name comes once, and before its arguments."""
        text, names, arguments = "", dict[int, str](), defaultdict[int, str](str)
        parts = (part for chunk in chunks for part in [self.parser.parse_stream_chunk(chunk)])
        for more, calls in (*parts, self.parser.parse_stream_end()):
            text += more
            for call in calls:
                if call.name:
                    assert call.tool_index not in names
                    names[call.tool_index] = call.name
                assert call.tool_index in names or not call.parameters
                arguments[call.tool_index] += call.parameters or ""
        return text, [(names[index], arguments[index]) for index in sorted(names)]


def chunks_of(text: str, sizes: Iterable[int]) -> Iterable[str]:
    start = 0
    for size in sizes:
        if start >= len(text):
            return
        yield text[start : start + size]
        start += size


def streamed(size: int, kind: str = "qwen25") -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of TEXT in chunks of so many characters."""
    text, calls = Counting(kind).stream(chunks_of(TEXT, [size] * len(TEXT)))
    return text, [(name, json.loads(arguments)) for name, arguments in calls if arguments]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", ["wrapped", "patched"])
def test_all_of_a_chunk_is_streamed(request: pytest.FixtureRequest, which: str, size: int) -> None:
    request.getfixturevalue(which)
    assert streamed(size) == ("Well. ", CALLS)
    text, calls = streamed(size, "hermes")  # whose calls have no white space around them
    assert (text.rstrip(), calls) == ("Well.", CALLS)


def test_sglang_alone_loses_text_and_calls(stock: None) -> None:
    """Else the wrapper and the patch can go."""
    assert streamed(1) == ("Well. ", CALLS)
    assert streamed(40)[0] == ""
    assert streamed(len(TEXT))[1] == []


def test_arguments_of_a_chunk_come_together(wrapped: None) -> None:
    tools = [Tool(function=Function(name="look", parameters={"type": "object"}))]
    parser = FunctionCallParser(tools, "qwen25")
    _, calls = parser.parse_stream_chunk(TEXT[: TEXT.index("</tool_call>")])
    assert [(call.name, call.parameters) for call in calls] == [("look", '{"at": "sea"}')]


def test_a_long_call_leaves_as_it_grows(wrapped: None) -> None:
    """At most a tenth is held back (the detector itself answers one increment late), and nothing once it has ended."""
    parser = Counting("qwen25").parser
    arguments = json.dumps({"at": CODE * 40}, ensure_ascii=False)
    begin = '<tool_call>\n{"name": "look", "arguments": '
    sent = 0
    for count, chunk in enumerate(chunks_of(begin + arguments + "}", [20] * len(arguments)), start=1):
        sent += sum(len(call.parameters) for call in parser.parse_stream_chunk(chunk)[1])
        assert sent >= (20 * count - len(begin)) * 0.9 - 100
    assert sent == len(arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_any_chunks_give_what_tokens_give(request: pytest.FixtureRequest, kind: str) -> None:
    """For parsers of every kind, texts that were cut short included."""
    rng = random.Random(kind)
    calls: list[Call] = [("look", {"at": "sea"}), ("look", {"at": CODE * 8, "n": 4}), ("go", {}), ("go", {"at": CODE})]
    calls = calls[1:2] if kind in ("interns1", "gigachat3") else calls
    whole = text_of(kind, calls)
    texts = [whole, *(whole[: rng.randrange(len(whole))] for _ in range(3))]
    request.getfixturevalue("stock")
    plain = [Counting(kind).stream(re.findall(r"\w+|\W", text)) for text in texts]
    assert [name for name, _ in plain[0][1]] == [name for name, _ in calls]
    request.getfixturevalue("wrapped")
    for text, expected in zip(texts, plain, strict=True):
        for sizes in ([len(text)], [len(text) // 2] * 3, [rng.randrange(1, 100) for _ in text]):
            got = Counting(kind).stream(chunks_of(text, sizes))
            assert got[0] == expected[0]
            # What is cut short in its last token, SGLang sends at the end itself.
            assert got[1] == expected[1] or (text != whole and _is_ahead_or_behind(got[1], expected[1]))


def _is_ahead_or_behind(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> bool:
    return len(one) == len(other) and all(
        name == other_name and (arguments.startswith(others) or others.startswith(arguments))
        for (name, arguments), (other_name, others) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("kind", ["qwen25", "hermes", "llama3", "mistral", "deepseekv32", "glm45", "step3"])
@pytest.mark.parametrize("unit", [CODE, "-" * 50, "} ] > ", "<tool_call> </tool_call> [1] "])
def test_the_cost_is_linear_in_the_text(wrapped: None, kind: str, unit: str) -> None:
    """Whatever the argument says, rounds of one token included. Markers in an argument end calls of some formats."""
    if unit[0] == "<" and kind == "glm45":
        unit = unit.replace("tool_call", "call")

    def cost(length: int, longest_chunk: int) -> tuple[int, int]:
        text = text_of(kind, [("look", {"at": unit * (length // len(unit))})])
        parser = Counting(kind)
        rng = random.Random(length)
        parser.stream(chunks_of(text, (rng.randrange(1, longest_chunk + 1) for _ in text)))
        return parser.calls, parser.characters

    for longest_chunk in (4, 60):
        calls, characters = cost(6000, longest_chunk)
        assert characters < 40 * 6100
        assert cost(12000, longest_chunk)[0] < calls + 60
