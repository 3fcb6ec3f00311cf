"""Streamed tool calls, as SGLang's parsers see them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.tool_streams import Parsed, ToolStream
from sglang_orthrus.compat.wrapping import wrap_once

_ONE_ANSWER_A_CHUNK = "a chunk gives one name or one call's arguments, and text before a call in its chunk is dropped"
_CHUNKS_OF_ANY_SIZE = "parsers take chunks of any size (patches/0007)"


@depends_on(
    "sglang.srt.function_call.function_call_parser:FunctionCallParser.parse_stream_chunk",
    "chunk_text",
    what="wrapped: a round's text is cut into words",
    why=_ONE_ANSWER_A_CHUNK,
    until=_CHUNKS_OF_ANY_SIZE,
)
@depends_on(
    "sglang.srt.function_call.function_call_parser:FunctionCallParser.parse_stream_end",
    what="wrapped: text that is still held back is parsed first",
    why=_ONE_ANSWER_A_CHUNK,
    until=_CHUNKS_OF_ANY_SIZE,
)
def parse_tool_calls_word_by_word() -> None:
    """Stream all the text and all the tool calls of a round, as if its text had come token by token."""
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    def cut(stock: Callable[..., Parsed]) -> Callable[..., Parsed]:
        @wraps(stock)
        def parse_stream_chunk(self: Any, chunk_text: str) -> Parsed:
            if not hasattr(self, "_orthrus_stream"):
                self._orthrus_stream = ToolStream(self.detector, lambda text: stock(self, text))
            stream: ToolStream = self._orthrus_stream
            return stream.parse(chunk_text)

        return parse_stream_chunk

    def complete(stock: Callable[..., Parsed]) -> Callable[..., Parsed]:
        @wraps(stock)
        def parse_stream_end(self: Any) -> Parsed:
            text, calls = self._orthrus_stream.end() if hasattr(self, "_orthrus_stream") else ("", [])
            more_text, more = stock(self)
            return text + more_text, calls + more

        return parse_stream_end

    wrap_once(FunctionCallParser, "parse_stream_chunk", cut)
    wrap_once(FunctionCallParser, "parse_stream_end", complete)
