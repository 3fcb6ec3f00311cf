"""The soak against real servers, under `make test-all`: some requests, and ten minutes of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from benchmarks.common.servers import Side, Sides
from benchmarks.volume.soak.requests import Mix
from benchmarks.volume.soak.run import Run, processor, soak
from sglang_orthrus.cli.server import Server

pytestmark = pytest.mark.e2e

REQUESTS = 60


class Shared:
    """The session's servers, which nobody stops here."""

    def __init__(self, orthrus: Server, plain: Server) -> None:
        self.orthrus, self.plain = (
            Side(name, server.url, weights=server.get("/model_info").json()["model_path"])
            for name, server in (("orthrus", orthrus), ("plain", plain))
        )

    @property
    def all(self) -> list[Side]:
        return [self.orthrus, self.plain]


@pytest.mark.slow
def test_sixty_requests_of_every_kind(orthrus: Server, plain: Server) -> None:
    sides = cast(Sides, Shared(orthrus, plain))
    run = Run(sides, Mix(0, processor=processor()), in_flight=8, late_penalties=True)
    result = soak(run, 0, REQUESTS, seconds=500.0, block=30, out=None)
    assert result["requests"] == REQUESTS
    assert not result["failures"], result["failed"]
    assert result["pool"]["orthrus"]["num_used_tokens"] == 0
    assert result["tokens_per_cycle"] > 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_minutes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.volume.soak",
        "--minutes",
        "10",
        "--results",
        str(tmp_path / "soak.json"),
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-5000:]
