"""The demo's arithmetic and its table."""

from __future__ import annotations

from sglang_orthrus.cli.demo import REQUESTS, Measurement, table

FAST = Measurement(output_ids=list(range(41)), cycles=8, seconds=0.25)
PLAIN = Measurement(output_ids=list(range(41)), cycles=0, seconds=1.0)


def test_rates() -> None:
    assert FAST.tokens_per_second == 164
    assert FAST.tokens_per_cycle == 5  # the prefill's token is nobody's
    assert PLAIN.tokens_per_cycle == 1


def test_table_names_what_differs() -> None:
    other = Measurement(output_ids=[1], cycles=1, seconds=0.5)
    lines = table({"chat": FAST, "json": other}, {"chat": PLAIN, "json": PLAIN}).splitlines()
    chat, json = (next(line.split() for line in lines if name in line) for name in ("chat", "json"))
    assert chat == ["chat", "yes", "41", "5.0", "41", "164", "4.0x"]
    assert json[1] == "NO"


def test_the_demo_asks_for_a_chat_a_schema_and_a_tool() -> None:
    assert "response_format" in REQUESTS["json"] and "tools" in REQUESTS["tool"] and "chat" in REQUESTS
