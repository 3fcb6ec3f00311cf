"""The programs in examples/, run as a user would."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_orthrus.cli.server import Server

pytestmark = pytest.mark.e2e
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _output(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def _answers(output: str) -> list[str]:
    """Without the questions, which the examples print behind a ">"."""
    return [line for line in output.splitlines() if line and not line.startswith(">")]


def _form(line: str) -> dict[str, Any]:
    """The form that several examples ask for."""
    form: dict[str, Any] = ast.literal_eval(line)
    assert {name: type(value) for name, value in form.items()} == {"name": str, "age": int, "city": str}
    return form


def _is_read_from(form: dict[str, Any], text: str) -> bool:
    return all(str(value) in text for value in form.values())


def _rounds(output: str) -> tuple[int, int]:
    """Tokens and rounds, as an example's last line tells them."""
    tokens, rounds = re.findall(r"(\d+) tokens in (\d+) draft-and-verify rounds", output)[-1]
    return int(tokens), int(rounds)


def test_chat(orthrus: Server) -> None:
    output = _output("chat.py", orthrus.url)
    *answer, form, _ = _answers(output)
    assert str(31 + 14 - 6) in answer[-1]
    assert _is_read_from(_form(form), output)
    tokens, rounds = _rounds(output)
    assert tokens > 2 * rounds


def test_frontend(orthrus: Server) -> None:
    answers = _answers(_output("frontend.py", orthrus.url))
    assert len(answers) == 3
    assert all(word in answer for word, answer in zip(("Dublin", "pilot", "rabbit"), answers, strict=True))


def test_json_schema(orthrus: Server) -> None:
    output = _output("json_schema.py", orthrus.url)
    question, order, summary = output.splitlines()
    fields = re.fullmatch(
        r"Order\(customer='(.+)', item='(.+)', quantity=(\d+), delivery_city='(.+)', is_gift=(?:True|False)\)", order
    )
    assert fields, order
    _, item, quantity, city = fields.groups()
    assert all(value in question for value in fields.groups())
    assert summary == f"{quantity} x {item} to {city}"


def test_tool_call(orthrus: Server) -> None:
    question, call, answer = _output("tool_call.py", orthrus.url).splitlines()
    found = re.fullmatch(r"get_weather\((.+)\) -> (.+)", call)
    assert found, call
    arguments, weather = map(ast.literal_eval, found.groups())
    assert list(arguments) == ["city"] and arguments["city"] in question
    assert str(weather["temperature"]) in answer


def test_regex(orthrus: Server) -> None:
    output = _output("regular_expression.py", orthrus.url)
    assert re.search(r"^\w+day, [0-2]\d:[0-5]\d, room [A-D][1-9]$", output, re.MULTILINE)


def test_frontend_json(orthrus: Server) -> None:
    lines = _output("frontend_json.py", orthrus.url).splitlines()
    assert len(lines) == 4
    forms = []
    for answer in lines[1::2]:
        form, _, date = answer.rpartition(" on ")
        forms.append(_form(form))
        assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", date)
    assert _is_read_from(forms[0], lines[0])  # nano misspells the other name


@pytest.mark.slow
def test_offline() -> None:
    output = _output("offline.py")
    for question, answer in (("47 + 85", 132), ("38 + 14 - 21 + 6", 37)):
        after = output.partition(f"> What is {question}?")[2].partition("\n>")[0]
        assert str(answer) in after


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("[!_]*.py")))
def test_an_example_stays_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 50
