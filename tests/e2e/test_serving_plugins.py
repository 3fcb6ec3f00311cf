"""Plugins beside ours, SGLang without ours, and both ways to start a server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, ServerError, plain_env
from tests.e2e.helpers import assert_same_output, generate, prompt_of, tokens_per_cycle, truth
from tests.servers import SETUP, TEST_ARGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NEIGHBOUR = """
    import logging

    def register():
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        SpeculativeAlgorithm.register("NEIGHBOUR", supports_overlap=True)(lambda server_args: object)
        HookRegistry.register(
            "sglang.srt.managers.scheduler.Scheduler.handle_generate_request", greet, HookType.BEFORE
        )
        logging.getLogger("neighbour").warning("neighbour registered")

    def greet(scheduler, request):
        logging.getLogger("neighbour").warning("neighbour saw a request of %d ids", len(request.input_ids))
"""
# What SGLang's processes do first; then the state of the process as far as this package could have changed it.
PROBE = """
    import logging, os, sys
    logging.basicConfig(level=logging.ERROR)
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins import load_plugins
    load_plugins()
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.speculative.spec_registry import get_spec

    print("ORTHRUS", get_spec("ORTHRUS") is not None)
    print("NEIGHBOUR", get_spec("NEIGHBOUR") is not None)
    print("OrthrusLM", "OrthrusLM" in ModelRegistry.models)
    print("variable", "SGLANG_EXTERNAL_MODEL_PACKAGE" in os.environ)
    print("modules", *sorted(name for name in sys.modules if name.startswith("sglang_orthrus")))
"""


@pytest.fixture(scope="module")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which another distribution with a plugin is installed, too."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "neighbour.py").write_text(dedent(NEIGHBOUR))
    metadata = folder / "neighbour-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: neighbour\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\nneighbour = neighbour:register\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path}


@pytest.fixture(scope="module")
def served(neighbour: dict[str, str]) -> Iterator[Server]:
    """ORTHRUS beside the other plugin, started with `sglang serve`: other tests use launch_server."""
    server = Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, env={**neighbour, **SETUP.env})
    server.command[: server.command.index("--model-path")] = [str(Path(sys.executable).with_name("sglang")), "serve"]
    with server:
        yield server


def probe(env: dict[str, str]) -> dict[str, list[str]]:
    command = [sys.executable, "-c", dedent(PROBE)]
    # Other tests may have loaded our plugin into this very process.
    inherited = {name: value for name, value in os.environ.items() if name != "SGLANG_EXTERNAL_MODEL_PACKAGE"}
    process = subprocess.run(command, env={**inherited, **env}, check=True, capture_output=True, text=True, timeout=240)
    return {key: values for key, *values in map(str.split, process.stdout.splitlines())}


@pytest.mark.parametrize("family", ["json", "prose"])
def test_sglang_serve_answers_as_launch_server_does(
    served: Server, plain: Server, reference: Reference, family: str
) -> None:
    ids = prompt_of(family)
    reply = generate(served, ids)
    assert_same_output(reference, ids, truth(plain, ids), reply)
    assert tokens_per_cycle(reply) > 1.5
    assert served.get("/server_info").json()["speculative_algorithm"] == "ORTHRUS"


def test_a_second_plugin_works_beside_ours(served: Server) -> None:
    """Its hook sits on the class that refuses requests for us."""
    ids = prompt_of("arith")
    generate(served, ids, 4)
    log = served.log_path.read_text()
    assert "neighbour registered" in log
    assert f"neighbour saw a request of {len(ids)} ids" in log


def test_both_plugins_register_in_one_process(neighbour: dict[str, str]) -> None:
    found = probe(neighbour)
    assert found["ORTHRUS"] == found["NEIGHBOUR"] == found["OrthrusLM"] == ["True"]


def test_without_our_plugin_sglang_is_untouched(neighbour: dict[str, str]) -> None:
    found = probe({**plain_env(), **neighbour, "SGLANG_PLUGINS": "neighbour"})
    assert found["NEIGHBOUR"] == ["True"]
    assert found["ORTHRUS"] == found["OrthrusLM"] == found["variable"] == ["False"]
    # The CPU platform is a plugin of its own, and chosen by name.
    platform = ("sglang_orthrus.cpu", "sglang_orthrus.compat")
    others = {name for name in found["modules"] if not name.startswith(platform)}
    assert others == ({"sglang_orthrus"} if "SGLANG_PLATFORM" in plain_env() else set())


def test_without_our_plugin_orthrus_is_an_unknown_algorithm(neighbour: dict[str, str]) -> None:
    env = {**plain_env(), **neighbour, "SGLANG_PLUGINS": "neighbour"}
    with pytest.raises(ServerError, match="Unknown speculative algorithm name: ORTHRUS"):
        Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, env=env).start()
