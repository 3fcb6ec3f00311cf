"""Streamed tool calls: a round's text may hold the end of one call and the start of the next.

SGLang's tool-call parsers are right for text that comes token by token. They lose text and calls that come together,
and most parse the whole call so far again at every chunk. So a round's text is cut: into words where a call may begin
or end, and into parts that grow with the call elsewhere. The cost stays linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sglang_orthrus.compat.ledger import depends_on

Parsed = tuple[str, list[Any]]

_WORD = re.compile(r"\w+|\W")
_JSON_SIGN = re.compile(r'["{}\[\]]')
_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
# A parser gets at least this share of the text that it holds at once, so that it parses a character about this often.
# Clients see arguments late by the same share of their length.
_SHARE = 32
# What may end a call where a parser names no markers.
_CLOSING = ["<", ">", "]", "}"]


@depends_on(
    "sglang.srt.function_call.base_format_detector:BaseFormatDetector",
    what="its _buffer is read",
    why="it holds the text that a parser parses again at the next chunk",
    until="parsers take chunks of any size (patches/0007)",
)
class ToolStream:
    """Gives one choice's text to its parser in parts of a suitable length.

    Args:
        detector: SGLang's detector of tool calls.
        parse: gives the detector more text, and returns the text and calls that this brings.
    """

    def __init__(self, detector: Any, parse: Callable[[str], Parsed]) -> None:
        self._detector = detector
        self._parse = parse
        self._held = ""  # not parsed yet
        self._ends = _ends_of(detector)

    def parse(self, chunk: str) -> Parsed:
        """What a chunk gives, and the text that was held back before it."""
        return self._run(self._held + chunk, is_last=False) if chunk else self._parse(chunk)

    def end(self) -> Parsed:
        """What the text gives that is still held back."""
        text, calls = self._run(self._held, is_last=True)
        while self._is_long():
            more_text, more = self._parse("")
            text += more_text
            _append(calls, more)
            if not more:
                break
        return text, calls

    def _run(self, pending: str, is_last: bool) -> Parsed:
        text, calls, start = "", list[Any](), 0
        while start < len(pending):
            end = self._next_cut(pending, start, is_last)
            if end is None:
                break
            more_text, more = self._parse(pending[start:end])
            start = end
            while True:
                text += more_text
                _append(calls, more)
                if not self._is_long() or not any(call.name for call in more):
                    break
                # A whole call may have come with its name: its arguments are the parser's next answer.
                more_text, more = self._parse("")
        self._held = pending[start:]
        return text, calls

    def _is_long(self) -> bool:
        """Whether the parser holds too much to parse it again for every word."""
        return len(self._detector._buffer) >= 2 * _SHARE

    def _next_cut(self, pending: str, start: int, is_last: bool) -> int | None:
        """Where the text ends that is parsed next; None to wait for more."""
        if self._is_long():
            end = self._ends.first(self._detector._buffer, pending, start)
            if end is not None:
                return end
            if is_last or len(pending) - start >= len(self._detector._buffer) // _SHARE:
                return len(pending)
            return None
        self._ends.reset()
        word = _WORD.match(pending, start)
        assert word is not None
        return word.end()


class _Markers:
    """Finds where a parser's markers begin and end."""

    def __init__(self, markers: list[str]) -> None:
        self._marker = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
        self._longest = max(map(len, markers))

    def reset(self) -> None:
        """A new call begins: there is nothing to forget."""

    def first(self, buffer: str, pending: str, start: int) -> int | None:
        """The first begin or end of a marker behind pending[start]; buffer: the text before it."""
        tail = buffer[1 - self._longest :]
        for marker in self._marker.finditer(tail + pending[start:]):
            for edge in marker.span():
                if edge > len(tail):
                    return start + edge - len(tail)
        return None


class _JsonEnds:
    """Finds where the JSON object of a call ends. It looks at each character once."""

    def __init__(self, bot_token: str) -> None:
        self._bot_token = bot_token
        self.reset()

    def reset(self) -> None:
        """A new call begins."""
        self._next = 0  # first character of the parser's text that was not looked at
        self._depth = 0
        self._is_string = False

    def first(self, buffer: str, pending: str, start: int) -> int | None:
        """The end of the object that began in `buffer`, if it is in pending[start:]."""
        if not self._next:
            begin = buffer.find(self._bot_token)
            self._next = max(buffer.find("{", begin + len(self._bot_token) if begin >= 0 else 0), 0)
        if self._next < len(buffer) and self._look(buffer, 0):
            return None  # the parser does not see an end there
        return self._look(pending, start - len(buffer))

    def _look(self, text: str, offset: int) -> int | None:
        """Look on; text[offset + n] is character n. The index behind the object's end, if it ends."""
        at = self._next + offset
        while at < len(text):
            if self._is_string:
                rest = _STRING.match(text, at)
                assert rest is not None
                # Behind the quote, or behind what a backslash at the end escapes.
                at = rest.end()
                if at < len(text):
                    self._is_string = text[at] != '"'
                    at += 2 if self._is_string else 1  # behind what a last backslash escapes, or the quote
                continue
            sign = _JSON_SIGN.search(text, at)
            at = sign.end() if sign else len(text)
            if sign and sign[0] == '"':
                self._is_string = True
            elif sign:
                self._depth += 1 if sign[0] in "{[" else -1
                if not self._depth:
                    self._next = at - offset
                    return at
        self._next = at - offset
        return None


@depends_on(
    "sglang.srt.function_call.function_call_parser:FunctionCallParser.ToolCallParserEnum",
    what="a detector's string attributes are taken for the markers of its calls",
    why="detectors do not say how a call ends",
    until="parsers take chunks of any size (patches/0007)",
)
def _ends_of(detector: Any) -> _JsonEnds | _Markers:
    """How the parser's calls end."""
    from sglang.srt.function_call.hermes_detector import HermesDetector
    from sglang.srt.function_call.llama32_detector import Llama32Detector
    from sglang.srt.function_call.mistral_detector import MistralDetector
    from sglang.srt.function_call.qwen25_detector import Qwen25Detector

    if isinstance(detector, HermesDetector | Llama32Detector | MistralDetector | Qwen25Detector):
        return _JsonEnds(detector.bot_token)
    # Markers are a parser's constants, such as `tool_call_end_token`.
    markers = [
        value
        for name, value in vars(detector).items()
        if isinstance(value, str) and len(value) > 1 and not name.endswith("regex") and name != "tool_call_separator"
    ]
    return _Markers(markers if len(markers) > 1 else _CLOSING)


def _append(calls: list[Any], more: list[Any]) -> None:
    """Add calls; the arguments of one call go out together."""
    for call in more:
        if calls and not call.name and call.tool_index == calls[-1].tool_index:
            calls[-1].parameters += call.parameters
        else:
            calls.append(call)
