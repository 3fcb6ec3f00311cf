"""The page about clients names what is tested, in the versions that are installed for it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.test_clients import CLIENTS, FAILS
from tests.servers import ROOT

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
FOLDER = ROOT / "tests" / "clients"


def test_the_page_names_the_versions_that_are_installed() -> None:
    rows = set(re.findall(r"^\| ([\w-]+) (\d[\w.]*) \|", PAGE, re.MULTILINE))
    pins = {
        (name.partition("[")[0].removesuffix("-slim"), version)
        for file in FOLDER.glob("requirements-*.txt")
        for name, version in re.findall(r"^(\S+)==(\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert rows - pins == set() == pins - rows


def test_every_program_is_run_in_an_environment_that_exists() -> None:
    programs = {path.stem for path in FOLDER.glob("*_client.py")}
    assert programs == {client for _, client in CLIENTS}
    environments = {path.stem.removeprefix("requirements-") for path in FOLDER.glob("requirements-*.txt")}
    assert environments == {environment for environment, _ in CLIENTS}


def test_known_failures_are_of_cases_that_exist() -> None:
    for (environment, client), cases in FAILS.items():
        assert (environment, client) in CLIENTS
        source = Path(FOLDER / f"{client}.py").read_text(encoding="utf-8")
        for case in cases:
            assert f"def {case}(" in source
