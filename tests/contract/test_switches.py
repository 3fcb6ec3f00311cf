"""`docs/switches.md`: every server argument that concerns rounds is in it, and what it says of them is true."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import NamedTuple

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_orthrus.server_args.flag_rules import RULES
from tests.servers import ROOT

pytestmark = pytest.mark.contract

PAGE = ROOT / "docs" / "switches.md"
# What starts servers: tests, and what they share with benchmarks and the command line.
TESTED = (
    *(ROOT / "tests").rglob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "sglang_orthrus/cli").rglob("*.py"),
)
GROUPS = ("model", "schedule", "memory", "parallel", "spec", "disagg", "lora", "exec")
WORKS, REFUSED, OWN = "works", "refused", "SGLang's own"


class Row(NamedTuple):
    """A line of a table."""

    names: list[str]
    state: str
    where: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `--"):
            names = [name.removeprefix("--").replace("-", "_") for name in re.findall(r"`(--[^`]*)`", cells[0])]
            found.append(Row(names, *cells[1:]))
    return found


def arguments() -> list[str]:
    """Of SGLang, in the groups that the page covers; names with an underscore first are no flags."""
    groups = {name: group.split(".")[0] for name, group in ServerArgs._NS_BY_FIELD.items()}
    return [name for name, group in groups.items() if group in GROUPS and name[0] != "_"]


def test_every_argument_has_a_line() -> None:
    patterns = [name for row in rows() for name in row.names]
    exact = [name for name in patterns if "*" not in name]
    assert len(exact) == len(set(exact))
    assert set(exact) <= set(arguments())
    missing = [name for name in arguments() if not any(fnmatch(name, pattern) for pattern in patterns)]
    assert not missing
    unused = [name for name in patterns if not any(fnmatch(own, name) for own in arguments())]
    assert not unused


def test_what_works_names_its_test() -> None:
    for row in rows():
        assert row.state in (WORKS, REFUSED, OWN), row
        if row.state == WORKS:
            (test,) = re.findall(r"`(tests/[\w/]+\.py)`", row.where)
            assert (ROOT / test).exists(), test


def test_what_works_is_an_argument_of_a_test() -> None:
    """The named one's, or of a server or a checkpoint's folder that it shares with others."""
    texts = "\n".join(path.read_text(encoding="utf-8") for path in TESTED)
    flags = {f"--{name.replace('_', '-')}" for row in rows() if row.state == WORKS for name in row.names}
    assert len(flags) > 40
    quoted = [f'"{flag[:-1]}' if flag.endswith("*") else f'"{flag}"' for flag in flags]
    assert [flag for flag in quoted if flag not in texts] == []


def test_what_is_refused_has_a_rule_and_each_rule_a_line() -> None:
    refused = {name for row in rows() if row.state == REFUSED for name in row.names}
    ruled = {rule.field for rule in RULES}
    assert refused <= ruled
    # Some values of these work.
    works = {"grammar_backend", "sampling_backend", "quantization", "load_format", "hicache_io_backend"}
    assert ruled & set(arguments()) - refused == works | {"hicache_mem_layout"}
