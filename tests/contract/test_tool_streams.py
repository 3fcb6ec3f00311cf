"""Text and tool calls come out of a stream whole, however many of them lie in one chunk."""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.base_format_detector import BaseFormatDetector
from sglang.srt.function_call.function_call_parser import FunctionCallParser

from sglang_orthrus import compat
from tests.contract.test_patches import PATCHES, apply, load

pytestmark = pytest.mark.contract

CALLS = [("look", {"at": "sea"}), ("look", {"at": "{sky}"}), ("go", {})]
TEXT = "Well. " + "\n".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    for name, arguments in CALLS
)
SIZES = [1, 7, 40, len(TEXT) - 60, len(TEXT)]


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own, which a test before this one may have wrapped by resolving arguments."""
    monkeypatch.setattr(FunctionCallParser, "parse_stream_chunk", inspect.unwrap(FunctionCallParser.parse_stream_chunk))


@pytest.fixture
def wrapped(stock: None) -> None:
    compat.stream_tool_calls_in_pieces()


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


def streamed(size: int, kind: str = "qwen25") -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of TEXT in chunks of so many characters."""
    tools = [Tool(function=Function(name=name, parameters={"type": "object"})) for name in ("look", "go")]
    parser = FunctionCallParser(tools, kind)
    text, names, arguments = "", dict[int, str](), defaultdict[int, str](str)
    for start in range(0, len(TEXT), size):
        more, calls = parser.parse_stream_chunk(TEXT[start : start + size])
        text += more
        for call in calls:
            if call.name:
                assert call.tool_index not in names
                names[call.tool_index] = call.name
            arguments[call.tool_index] += call.parameters
    return text, [(names[index], json.loads(arguments[index])) for index in sorted(names) if arguments[index]]


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
