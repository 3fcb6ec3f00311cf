"""Unlike attention backends for prefill and decode, and deterministic inference, on FlashInfer in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.common.greedy import load_prompts
from benchmarks.common.reference import Reference
from benchmarks.common.setups import BF16_NEAR_TIE, ONE_WIDTH
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar
from tests.e2e.helpers import Reply, divergence_of, generate, tokens_per_cycle

pytestmark = pytest.mark.gpu

COMMON = (
    *("--dtype", "bfloat16", "--mem-fraction-static", "0.8", "--max-total-tokens", "65536"),
    *("--max-running-requests", "16", "--cuda-graph-max-bs-decode", "4", "--context-length", "2048"),
    *("--cuda-graph-backend-prefill", "disabled"),  # they take minutes to make
)
COUNT = 18
# Who verifies: FlashInfer as the prefill backend, FlashInfer as the decode backend, and the other one beside it.
UNLIKE = {
    "flashinfer, fa3": ("--prefill-attention-backend", "flashinfer", "--decode-attention-backend", "fa3"),
    "fa3, flashinfer verifies": (
        *("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer"),
        *("--speculative-attention-mode", "decode"),
    ),
    "triton verifies, flashinfer": (
        "--prefill-attention-backend",
        "triton",
        "--decode-attention-backend",
        "flashinfer",
    ),
}


def _collect(server: Server, at_once: int) -> list[Reply]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: generate(server, prompt.ids), load_prompts(NANO, COUNT)))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Reply]]:
    """Plain SGLang's greedy answers on FlashInfer."""
    exported: Path = export_ar(NANO, tmp_path_factory.mktemp("plain") / "nano-ar")
    with Server(exported, *COMMON, "--attention-backend", "flashinfer", env=plain_env()) as server:
        yield _collect(server, 1)


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_backends_answer_as_plain_sglang_does(name: str, expected: list[Reply], reference: Reference) -> None:
    """Alone and six at a time: graphs of one request, of four with padding, and passes that no graph covers."""
    with Server(NANO, *ORTHRUS_ARGS, *COMMON, *UNLIKE[name], env=ONE_WIDTH) as server:
        answers = {at_once: _collect(server, at_once) for at_once in (1, 3, 6)}
    for at_once, replies in answers.items():
        for prompt, theirs, ours in zip(load_prompts(NANO, COUNT), expected, replies, strict=True):
            answers_of_both = theirs["output_ids"], ours["output_ids"]
            found = divergence_of(reference, prompt.ids, *answers_of_both, BF16_NEAR_TIE)
            assert found is None or found.near_tie, (name, at_once, prompt.name, found)
        rounds = [tokens_per_cycle(reply) for reply in replies if reply["meta_info"]["spec_verify_ct"]]
        assert sum(rounds) / len(rounds) > 3, "a drafter that reads stale lengths drafts badly"


def test_under_deterministic_inference_neighbours_do_not_matter() -> None:
    """The same seeded request alone and beside seven others, in graphs and where no graph covers the batch."""
    # Long enough that FlashInfer takes the same tile for their prefill alone and together: above 32 tokens.
    prompts = [prompt.ids for prompt in load_prompts(NANO, 200) if 36 <= len(prompt.ids) <= 120][:12]
    assert len(prompts) >= 8
    flags = ("--attention-backend", "flashinfer", "--enable-deterministic-inference")
    with Server(NANO, *ORTHRUS_ARGS, *COMMON, *flags) as server:

        def ask(number: int) -> list[int]:
            options = {"temperature": 1.2, "sampling_seed": 7 + number}
            tokens: list[int] = generate(server, prompts[number], 192, **options)["output_ids"]
            return tokens

        alone = [ask(number) for number in range(len(prompts))]
        # A graph covers four requests at most.
        for at_once in (4, 8, len(prompts)):
            with ThreadPoolExecutor(at_once) as pool:
                assert list(pool.map(ask, range(len(prompts)))) == alone, f"{at_once} at once"
