"""A process that several modules ask about."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.processes import output_of


@pytest.fixture(scope="session")
def installed() -> dict[str, Any]:
    """What `tests.contract.installing` tells of a process in which all that changes SGLang is installed."""
    found: dict[str, Any] = output_of("tests.contract.installing")
    return found
