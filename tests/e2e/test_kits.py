"""SGLang's own test kits, unmodified, against ORTHRUS; `make kits` runs those, too, that take longer.

They know nothing of ORTHRUS, so they check that a server with it is a server like any other.
"""

from __future__ import annotations

import json
import random
import shutil
import unittest
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from sglang.test.kits import radix_cache_server_kit
from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test
from sglang.test.server_fixtures.spec_eagle_fixture import SpecEagleServerBase

from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar
from tests.e2e import kits
from tests.e2e.kits import NOT_RUN, RUN, WITHOUT_TESTS, Kit
from tests.servers import KIT_ARGS, NO_WHITE_SPACE, REASONING, change, thinking_by_default

# The longest kit takes ten minutes on two cores.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


THINKING_CONTEXT_LENGTH = 16384
MASK_TOKEN = 4095, "<|mask|>"
CHECKED = {"SGLANG_ENABLE_CHECKED_MEM_CHECK_DURING_BUSY": "1"}


@dataclass(frozen=True)
class Launch:
    """How a server is started: on nano, changed by `edit`, with these flags and variables."""

    args: tuple[str, ...]
    env: Mapping[str, str]
    edit: Callable[[Path], None] = lambda folder: None


def think(folder: Path) -> None:
    """Let it think unless asked not to, and give it room for the kits' prompts."""
    thinking_by_default(folder)
    change(folder / "config.json", max_position_embeddings=THINKING_CONTEXT_LENGTH)


def never_end(folder: Path) -> None:
    """Give it an end-of-text token that it never says, so that it talks until a stop string of the kits comes along."""
    change(folder / "config.json", eos_token_id=MASK_TOKEN[0])
    change(folder / "generation_config.json", eos_token_id=MASK_TOKEN[0])
    change(folder / "tokenizer_config.json", eos_token=MASK_TOKEN[1])


LAUNCHES = {
    # The shared server `small` with room for long prompts. Where a JSON grammar allows white space, nano writes little
    # else.
    "common": Launch(
        (
            *("--dtype", "float32", "--chunked-prefill-size", "256", "--tool-call-parser", "qwen25"),
            *(*REASONING, *KIT_ARGS, NO_WHITE_SPACE),
        ),
        CHECKED,
        think,
    ),
    # Requests are drawn at random here unless they say otherwise.
    "hot": Launch(("--dtype", "float32", "--chunked-prefill-size", "256"), CHECKED, think),
    "narrow": Launch(
        ("--dtype", "float32", "--max-running-requests", "1"), {"SGLANG_REQ_WAITING_TIMEOUT": "0.2"}, never_end
    ),
    "endless": Launch(
        ("--dtype", "float32", "--enable-streaming-session", "--allow-auto-truncate"), CHECKED, never_end
    ),
    # Of the kit's own sizes; a prompt beyond this context has to be refused.
    "short": Launch(
        ("--dtype", "float32", "--enable-streaming-session", "--context-length", "512", "--page-size", "256"), CHECKED
    ),
    # Without the warm-up, which the timeout would hit on a busy machine.
    "hasty": Launch(("--dtype", "float32", "--skip-server-warmup"), CHECKED | {"SGLANG_REQ_RUNNING_TIMEOUT": "2"}),
}


class Servers:
    """One server at a time, since each takes gigabytes: another one is started when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._current: tuple[str, bool] | None = None
        self._running = ExitStack()

    def get(self, name: str, *, is_plain: bool = False) -> Server:
        """The server of that name; is_plain: without ORTHRUS and on the AR view alone."""
        if self._current != (name, is_plain):
            self.stop()
            launch = LAUNCHES[name]
            model = self._model(name, launch)
            if is_plain:
                exported = self._folder / f"{name}-plain"
                model = exported if exported.exists() else export_ar(model, exported)
            algorithm, env = ((), plain_env()) if is_plain else (ORTHRUS_ARGS, {})
            self._server = self._running.enter_context(
                Server(model, *algorithm, *launch.args, env={**launch.env, **env})
            )
            self._current = name, is_plain
        return self._server

    def stop(self) -> None:
        self._current = None
        self._running.close()

    def _model(self, name: str, launch: Launch) -> Path:
        model = self._folder / name
        if not model.exists():
            launch.edit(Path(shutil.copytree(NANO, model)))
        return model


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    running = Servers(tmp_path_factory.mktemp("kits"))
    yield running
    running.stop()


class Process:
    """What the kits ask of the server's `Popen`."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def poll(self) -> int | None:
        return None if self._server.is_running else 1


class KitCase(unittest.TestCase):
    """What the kits expect of the class that mixes them in; the rest is in their table."""

    model: str
    base_url: str
    process: Process
    tokenizer: Any
    client: openai.Client
    api_key = "none"
    timeout = 120
    run_decode = SpecEagleServerBase.run_decode
    send_request = SpecEagleServerBase.send_request
    send_requests_abort = SpecEagleServerBase.send_requests_abort

    @classmethod
    def connect(cls, server: Server) -> None:
        cls.model = model_of(server)
        cls.base_url = server.url
        cls.process = Process(server)
        cls.tokenizer = get_tokenizer(cls.model)
        cls.client = openai.Client(api_key=cls.api_key, base_url=f"{server.url}/v1")
        if hasattr(cls, "init_reasoning_token_verifier"):
            cls.init_reasoning_token_verifier()

    @classmethod
    def flush_cache(cls) -> None:
        requests.post(f"{cls.base_url}/flush_cache?timeout=30", timeout=cls.timeout).raise_for_status()


def model_of(server: Server) -> str:
    return str(server.get("/get_model_info").json()["model_path"])


@pytest.fixture(scope="class")
def connected(request: pytest.FixtureRequest, servers: Servers) -> None:
    request.cls.connect(servers.get(request.cls.server))


@pytest.fixture(scope="class")
def connected_to_small(request: pytest.FixtureRequest, small: Server) -> None:
    request.cls.connect(small)


class Vocabulary(random.Random):
    """The radix kit draws token ids up to 31999, beyond nano's vocabulary: they are folded into it."""

    def randint(self, a: int, b: int) -> int:
        return super().randint(a, b) % 4000 if b == 31999 else super().randint(a, b)


@pytest.fixture(scope="module", autouse=True)
def _token_ids_of_nano() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radix_cache_server_kit, "random", Vocabulary(0))
        yield


def make_case(name: str, kit: Kit, **attributes: Any) -> type[KitCase]:
    """A test class of one kit."""
    module, _, mixin = name.rpartition(".")
    base = getattr(import_module(f"sglang.test.kits.{module}"), mixin)
    return type(mixin, (base, KitCase), {"server": kit.server, **kit.overrides, **attributes})


def make_collected_cases(name: str, kit: Kit) -> dict[str, type[KitCase]]:
    """The tests that are for nano and ORTHRUS: quick ones on the shared server, slow ones on a server of the kit's."""
    rest = kits.installed_kits()[name] - {*kit.refused, *kit.fails_alike}
    # Another server takes as long to start as most kits to run.
    slow = rest if kit.slow is None or kit.server != "common" else kit.slow
    left_out = [*kit.refused, *kit.fails_alike]
    quick_case = make_case(name, kit, **dict.fromkeys([*left_out, *slow]))
    slow_case = make_case(name, kit, **dict.fromkeys([*left_out, *(rest - slow)]))
    title = name.rpartition(".")[2]
    return {
        title: pytest.mark.usefixtures("connected_to_small")(quick_case),
        f"{title}Slow": pytest.mark.slow(pytest.mark.usefixtures("connected")(slow_case)),
    }


@pytest.mark.slow
def test_a_conversation_finds_its_former_turns_in_the_cache(servers: Servers, tmp_path: Path) -> None:
    """`cache_hit_kit`, with a data set of our own in the place of the one that it downloads."""
    server = servers.get("common")
    dataset = tmp_path / "conversations.json"
    turns = [{"value": f"Conversation {index}: tell me of {index} wooden flutes."} for index in range(40)]
    dataset.write_text(json.dumps([{"conversations": [turn, turn]} for turn in turns]))
    result = run_multiturn_cache_hit_test(server.url, model_of(server), num_clients=4, dataset_path=str(dataset))
    assert result["overall"]["cache_hit_rate"] > 0.5


# In the order of their servers, so that each is started once.
for name, kit in sorted(RUN.items(), key=lambda item: item[1].server):
    globals().update(make_collected_cases(name, kit))


def test_no_installed_kit_is_missing_from_the_tables() -> None:
    installed = kits.installed_kits()
    assert set(installed) == set(RUN) | set(NOT_RUN)
    assert not set(RUN) & set(NOT_RUN)
    for name, kit in RUN.items():
        assert {*kit.refused, *kit.fails_alike, *(kit.slow or ())} <= installed[name], name
    assert kits.installed_modules() - {name.partition(".")[0] for name in installed} == set(WITHOUT_TESTS)


def test_the_documentation_names_every_kit() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "kits.md").read_text(encoding="utf-8")
    for name in (*RUN, *NOT_RUN, *WITHOUT_TESTS):
        assert f"`{name.rpartition('.')[2]}`" in text


@pytest.mark.slow
@pytest.mark.parametrize("server", sorted({kit.server for kit in RUN.values() if kit.fails_alike}))
def test_what_is_beyond_nano_fails_alike_on_plain_sglang(servers: Servers, server: str) -> None:
    ours, theirs = (failures(servers.get(server, is_plain=is_plain), server) for is_plain in (False, True))
    assert ours == theirs
    for test, message in ours.items():
        assert message is not None, f"{test} passes: it belongs among the kits that run"
        assert "Connection" not in message


def failures(server: Server, name: str) -> dict[str, str | None]:
    """What every test says that is known to fail on the server of that name."""
    return {
        test: failure(make_case(kit_name, kit), test, server)
        for kit_name, kit in RUN.items()
        if kit.server == name
        for test in sorted(kit.fails_alike)
    }


def failure(case: type[KitCase], test: str, server: Server) -> str | None:
    """The last line of what a kit's test says when it fails; None if it passes."""
    case.connect(server)
    result = unittest.TestResult()
    case(test).run(result)
    problems = [*result.failures, *result.errors]
    return problems[0][1].strip().splitlines()[-1] if problems else None
