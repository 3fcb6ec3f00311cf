"""Clients that people use get of ORTHRUS what they get of plain SGLang. `make clients` installs them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import both
from tests.patching import patched_sglang
from tests.servers import ROOT, SETUP, TEST_ARGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ENVIRONMENTS = ROOT / ".venv-clients"
# Programs of `tests/clients`, by the environment that has what they need.
CLIENTS = (
    ("current", "openai_client"),
    ("current", "pydantic_ai_client"),
    ("current", "anthropic_client"),
    ("openai2", "openai_client"),
    ("openai2", "langchain_client"),
    ("openai2", "instructor_client"),
    ("openai2", "litellm_client"),
)
# nano, without `strict`, names an argument that the schema does not have.
NOT_STRICT = "customer\n  Field required"
# What fails, and on plain SGLang alike: a part of the message, by environment and client, and by case.
FAILS: dict[tuple[str, str], dict[str, str]] = {
    ("current", "openai_client"): {
        "strict_chat": "Data returned by API invalid for expected schema",
        "responses_of_default_model": "The model 'default' does not exist",
    },
    ("openai2", "openai_client"): {"responses_of_default_model": "The model 'default' does not exist"},
    ("openai2", "langchain_client"): {"structured_function_calling": NOT_STRICT},
    ("openai2", "instructor_client"): {
        # JSON mode takes any object, and nano ends it early.
        "json_mode": "item\n  Field required",
        **dict.fromkeys(("tools", "tools_strict", "partial_tools"), NOT_STRICT),
    },
}
ORDER = {"customer": "Grace Novak", "item": "copper lantern", "quantity": 12}
LOAD_REQUESTS = 12


def python_of(environment: str) -> Path:
    """The interpreter of an environment; the test is skipped where it is missing."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.with_name("pip").exists():
        pytest.skip(f"needs the environment {python.parents[1].relative_to(ROOT)}: make clients")
    return python


def outcomes(server: Server, environment: str, client: str) -> dict[str, dict[str, Any]]:
    """What came of every case of a client."""
    command = [str(python_of(environment)), "-m", f"tests.clients.{client}", server.url]
    done = subprocess.run(command, cwd=ROOT, env=_env(), capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _env() -> dict[str, str]:
    """Of a program that knows this repository, and nothing of the environment that the tests run in."""
    left_out = {"PYTHONPATH", "HF_HUB_OFFLINE"}
    # litellm otherwise asks the network for prices.
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}


@pytest.mark.parametrize(("environment", "client"), CLIENTS)
def test_a_client_gets_what_it_gets_of_plain_sglang(
    orthrus: Server, plain: Server, environment: str, client: str
) -> None:
    ours, theirs = both(outcomes, (orthrus, plain), environment, client)
    assert ours == theirs
    failed = {case: found["error"] for case, found in ours.items() if "error" in found}
    known = FAILS.get((environment, client), {})
    assert set(failed) == set(known), failed
    for case, message in failed.items():
        assert known[case] in message


@pytest.fixture(name="strict", scope="module")
def _strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ORTHRUS with the patch for metadata, and where arguments of tools follow their schemas unasked."""
    env = patched_sglang("0025-metadata-of-strings", tmp_path_factory.mktemp("patched"))
    env |= {**SETUP.env, "SGLANG_TOOL_STRICT_LEVEL": "2"}
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, env=env, timeout=600) as server:
        yield server


def test_answers_of_a_patched_server_are_valid_by_openais_schema(strict: Server) -> None:
    found = outcomes(strict, "current", "openai_client")
    assert found["strict_chat"] == {"result": found["chat"]["result"][0]}


@pytest.mark.parametrize("client", ["instructor_client", "langchain_client"])
def test_tools_follow_their_schemas_where_the_server_is_told_to(strict: Server, client: str) -> None:
    found = outcomes(strict, "openai2", client)
    known = [case for case, message in FAILS["openai2", client].items() if message == NOT_STRICT]
    assert known and all(found[case] == {"result": ORDER} for case in known), found


def load(server: Server, folder: Path) -> dict[str, Any]:
    """aiperf's report on a small load of greedy requests."""
    out = folder / str(server.port)
    command = [
        *(str(python_of("openai2").with_name("aiperf")), "profile", "--model", "default", "--url", server.url),
        *("--endpoint-type", "chat", "--streaming", "--tokenizer", str(NANO), "--use-server-token-count"),
        *("--concurrency", "2", "--request-count", str(LOAD_REQUESTS), "--random-seed", "7"),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "48", "--extra-inputs", "temperature:0"),
        *("--ui", "none", "--workers-max", "1", "--output-artifact-dir", str(out)),
    ]
    done = subprocess.run(command, cwd=folder, env=_env(), capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads((out / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    return report


def test_a_load_generator_measures_both_servers(orthrus: Server, plain: Server, tmp_path: Path) -> None:
    reports = both(load, (orthrus, plain), tmp_path)
    for report in reports:
        assert report["request_count"]["avg"] == LOAD_REQUESTS
        assert report["error_summary"] == []
        assert report["output_token_throughput"]["avg"] > 0
    ours, theirs = (report["total_output_tokens"]["avg"] for report in reports)
    assert ours == theirs > 0
