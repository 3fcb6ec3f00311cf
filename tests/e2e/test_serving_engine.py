"""Programs that use SGLang as a library: the offline engine, and the frontend language against a server."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import sglang as sgl

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import Reply, assert_same_outputs, both, generate, prompt_of, tokens_per_cycle

pytestmark = pytest.mark.e2e

# The engine starts its processes by importing the main module again, hence a program of its own.
ENGINE = """
import asyncio, json, sys
import torch
import sglang as sgl

async def stream(engine, ids, sampling):
    return [chunk async for chunk in await engine.async_generate(input_ids=ids, sampling_params=sampling, stream=True)]

async def together(engine, prompts, sampling):
    calls = [engine.async_generate(input_ids=ids, sampling_params=sampling) for ids in prompts]
    return await asyncio.gather(*calls, stream(engine, prompts[0], sampling))

def main():
    model, prompts, options = json.loads(sys.argv[1])
    engine = sgl.Engine(model_path=model, dtype="float32", context_length=2048, log_level="error", **options)
    sampling = {"temperature": 0, "max_new_tokens": 200}
    answers = {
        "batch": engine.generate(input_ids=prompts, sampling_params=sampling),
        "one by one": [engine.generate(input_ids=ids, sampling_params=sampling) for ids in prompts],
        "stream": list(engine.generate(input_ids=prompts[0], sampling_params=sampling, stream=True)),
    }
    *answers["async"], answers["async stream"] = engine.loop.run_until_complete(together(engine, prompts, sampling))
    engine.shutdown()
    print("ANSWERS" + json.dumps(answers))

if __name__ == "__main__":
    main()
"""
PROMPTS = [prompt_of(family) for family in ("json", "arith", "qa", "prose")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an engine with ORTHRUS answers, by the way of asking."""
    script = tmp_path_factory.mktemp("engine") / "engine.py"
    script.write_text(ENGINE)
    arguments = [str(NANO), PROMPTS, {"speculative_algorithm": "ORTHRUS"}]
    command = [sys.executable, str(script), json.dumps(arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    found: dict[str, Any] = json.loads(output.rpartition("ANSWERS")[2])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["batch", "one by one", "async"])
def test_the_engine_answers_as_a_plain_server(
    answers: dict[str, Any], plain: Server, reference: Reference, way: str
) -> None:
    replies: list[Reply] = answers[way]
    assert_same_outputs(reference, plain, [(ids, 200) for ids in PROMPTS], replies)
    assert tokens_per_cycle(replies[0]) > 4


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stream", "async stream"])
def test_the_engine_streams_a_round_at_a_time(answers: dict[str, Any], way: str) -> None:
    whole: Reply = answers["one by one"][0]
    chunks: list[Reply] = answers[way]
    assert chunks[-1]["text"] == whole["text"]
    assert chunks[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert all(later["text"].startswith(earlier["text"]) for earlier, later in pairwise(chunks))
    assert 1 < len(chunks) <= whole["meta_info"]["spec_verify_ct"] + 2 < len(whole["output_ids"])


WORLD = (
    "Anna Weber is 41 years old and works as a pilot. Anna Weber lives in Prague. Anna Weber has a parrot called Leo. "
    "The best friend of Anna Weber is Ivan Cook. Ivan Cook is 29 years old and works as a baker. Ivan Cook lives in "
    "Dublin. The best friend of Ivan Cook is Anna Weber."
)
NO_THINKING = "<think>\n\n</think>\n\n"


@sgl.function
def fork_and_join(s: Any) -> None:
    s += sgl.user(f"{WORLD}\n\nWhere does Ivan Cook live?")
    s += sgl.assistant_begin() + NO_THINKING
    forks = s.fork(3)
    for number, fork in enumerate(forks):
        fork += f"Answer {number + 1}: " + sgl.gen("part", max_tokens=6 + 5 * number)
    forks.join()
    s += " | ".join(fork["part"] for fork in forks) + "\n" + sgl.gen("joined", max_tokens=40)


@sgl.function
def stops(s: Any) -> None:
    s += "Step 1: 3 + 4 = 7\nStep 2:" + sgl.gen("step", max_tokens=60, stop=["\n", "Answer"])
    s += "\nStep 3:" + sgl.gen("rest", max_tokens=60, stop_token_ids=[4090])


@sgl.function
def multi_turn(s: Any) -> None:
    s += sgl.system("You are a helpful assistant.")
    for number, question in enumerate(("What is 47 + 85?", "What is 38 + 14 - 21 + 6?", "Tell me about yourself.")):
        s += sgl.user(question)
        s += sgl.assistant(NO_THINKING + sgl.gen(f"answer {number}", max_tokens=120))


@sgl.function
def constrained(s: Any, name: str) -> None:
    s += f"{WORLD}\n\nThe age of {name} is " + sgl.gen("age", max_tokens=4, regex="[1-9][0-9]") + " years, a "
    s += sgl.gen("job", max_tokens=16, regex="(pilot|baker|weaver)") + "."


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (fork_and_join, ("joined",)),
        (stops, ("step", "rest")),
        (multi_turn, ("answer 0", "answer 1", "answer 2")),
    ],
    ids=["fork-and-join", "stops", "multi-turn"],
)
def test_a_program_writes_what_it_writes_with_a_plain_server(
    orthrus: Server, plain: Server, program: Any, names: tuple[str, ...]
) -> None:
    ours, theirs = both(lambda server: program.run(backend=endpoint(server), temperature=0), (orthrus, plain))
    assert ours.text() == theirs.text()
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert all(ours[name] for name in names)
    assert ours.get_meta_info(names[-1])["spec_verify_ct"] > 0


def test_a_streamed_program_yields_its_text(orthrus: Server, plain: Server) -> None:
    texts = []
    for server in (orthrus, plain):
        state = multi_turn.run(backend=endpoint(server), temperature=0, stream=True)
        texts.append("".join(state.text_iter()))
    assert texts[0] == texts[1]
    assert "132" in texts[0]


def test_a_batch_of_programs_writes_what_it_writes_with_a_plain_server(orthrus: Server, plain: Server) -> None:
    arguments = [{"name": name} for name in ("Anna Weber", "Ivan Cook", "Nobody")]
    states = [
        constrained.run_batch(arguments, backend=endpoint(server), temperature=0, num_threads=3)
        for server in (orthrus, plain)
    ]
    assert [state.text() for state in states[0]] == [state.text() for state in states[1]]


def test_filling_the_cache_needs_no_temperature(orthrus: Server, plain: Server) -> None:
    """SGLang's frontend language asks for no tokens so, at the default temperature of 1."""
    ids = prompt_of("chat", 1)
    body = {"input_ids": list(ids), "sampling_params": {"max_new_tokens": 0}}
    replies = both(Server.post, (orthrus, plain), "/generate", body)
    assert replies[0]["output_ids"] == replies[1]["output_ids"] == []
    assert generate(orthrus, ids)["meta_info"]["cached_tokens"] >= len(ids) - 1


def endpoint(server: Server) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(server.url, chat_template_name="qwen")
