"""The soak's requests: every kind mixed at random, each a pure function of the seed and its number."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Literal

from benchmarks.volume.soak.options import Draft, logprobs, options, prompt, tools
from benchmarks.volume.soak.prompts import history, json_schema, order, question, render, tool_task

Act = Literal["whole", "stream", "cut", "abort", "session", "control"]
_ACTS: tuple[Act, ...] = ("whole", "stream", "cut", "abort")
_CUT_LIMIT = 400
ABORT_ALL = "control: abort all"


@dataclass(frozen=True)
class Request:
    """One request, and what its answers have to keep to.

    Attributes:
        kind: for counts, its most telling options.
        body: as sent; `stream` and `rid` are added by the client.
        act: "cut" and "abort" end a stream once `after` tokens came; a session sends its `turns` one after another.
        greedy: whether the tokens are those of plain SGLang.
        answers: how many come back, over all prompts of a batch and `n`.
        limit: tokens at most; None up to the end of the context.
        min_tokens: tokens at least, unless a stop string or the context ends the text.
        valid: what a constrained text has to be (`soak_prompts.Grammar`).
        stops: strings that must not be in the text.
        banned: ids that must not come.
        logprobs: "top" and "ids" numbers per token, if log probabilities are wanted.
    """

    number: int
    kind: str
    path: str
    body: dict[str, Any]
    act: Act = "whole"
    greedy: bool = True
    answers: int = 1
    limit: int | None = None
    min_tokens: int = 0
    valid: dict[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    banned: tuple[int, ...] = ()
    logprobs: dict[str, int] | None = None
    after: int = 0
    turns: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All of it, for a report."""
        return asdict(self)


@dataclass(frozen=True)
class Mix:
    """What the servers of a run understand.

    Attributes:
        seed: of everything that is random.
        context: tokens of a text at most.
        processor: SGLang's custom processor that forbids `custom_params.token_ids`, serialised; None for none.
    """

    seed: int
    context: int = 2048
    processor: str | None = None

    def request(self, number: int) -> Request:
        """The request of that number."""
        random = Random(f"soak/{self.seed}/{number}")
        make = random.choices(
            (_generate, _completion, _chat, _session, _control, _to_the_end), (500, 140, 300, 30, 30, 2)
        )[0]
        return make(random, self, number)


def _finish(draft: Draft, number: int, endpoint: str, path: str, act: Act) -> Request:
    words = ["greedy"] * draft.rules["greedy"] + draft.words + [act] * (act != "whole")
    return Request(number, f"{endpoint}: {', '.join(words)}", path, draft.body, act, **draft.rules)


def _generate(random: Random, mix: Mix, number: int) -> Request:
    draft = options(random, mix.processor)
    prompts = [prompt(random, mix.seed, draft) for _ in range(random.choices((1, 2, 4), (93, 5, 2))[0])]
    copies = random.choices((1, 2, 3), (94, 4, 2))[0]
    draft.words += ["batch"] * (len(prompts) > 1) + ["n"] * (copies > 1)
    draft.rules["answers"] = answers = len(prompts) * copies
    draft.sampling["n"] = copies
    draft.body |= {"text": prompts if len(prompts) > 1 else prompts[0], "sampling_params": draft.sampling}
    if random.random() < 0.15:
        logprobs(random, draft)
    act: Act = "whole"
    if answers == 1:
        act = random.choices(_ACTS, (62, 26, 7, 5))[0]
    if act in ("cut", "abort"):
        draft.rules["after"] = random.randrange(1, 24)
        if not draft.rules["valid"]:
            draft.sampling |= {"max_new_tokens": _CUT_LIMIT, "ignore_eos": True}
            draft.rules["limit"] = _CUT_LIMIT
    return _finish(draft, number, "generate", "/generate", act)


def _completion(random: Random, mix: Mix, number: int) -> Request:
    draft = options(random, mix.processor)
    if draft.sampling.pop("structural_tag", None):
        draft.rules["valid"] = {}
    prompts = [prompt(random, mix.seed, draft) for _ in range(random.choices((1, 3), (95, 5))[0])]
    copies = random.choices((1, 2), (94, 6))[0]
    draft.openai(copies)
    draft.body |= {"prompt": prompts if len(prompts) > 1 else prompts[0], "return_token_ids": True}
    draft.rules["answers"] = len(prompts) * copies
    if random.random() < 0.1 and not draft.rules["valid"] and not draft.rules["stops"]:
        draft.body["echo"] = True
        draft.words.append("echo")
    if random.random() < 0.1:
        top = random.randrange(0, 6)
        draft.body["logprobs"] = top
        draft.rules["logprobs"] = {"top": top, "ids": 0}
        draft.words.append("logprobs")
    return _finish(draft, number, "completion", "/v1/completions", random.choice(("whole", "whole", "stream")))


def _chat(random: Random, mix: Mix, number: int) -> Request:
    form = random.choices(("text", "json", "tools"), (45, 25, 30))[0]
    draft = options(random, mix.processor, free=form == "text")
    draft.openai(random.choices((1, 2), (95, 5))[0])
    draft.rules["answers"] = draft.body["n"]
    draft.body["return_output_ids_in_sglext"] = True
    task = question(random)
    if form == "json":
        wanted, hint = json_schema(random)
        draft.body["response_format"] = {"type": "json_schema", "json_schema": {"name": "data", "schema": wanted}}
        draft.rules["valid"] = {"schema": wanted}
        task = order(random) + hint
        draft.words.append("json")
    elif form == "tools":
        task = tool_task(random)
        tools(random, draft)
    elif random.random() < 0.25:
        draft.body["chat_template_kwargs"] = {"enable_thinking": True}
        draft.words.append("thinking")
    draft.body["messages"] = [{"role": "user", "content": task}]
    if random.random() < 0.1:
        top = random.randrange(0, 6)
        draft.body |= {"logprobs": True, "top_logprobs": top}
        draft.rules["logprobs"] = {"top": top, "ids": 0}
        draft.words.append("logprobs")
    return _finish(draft, number, "chat", "/v1/chat/completions", random.choice(("whole", "whole", "stream")))


def _to_the_end(random: Random, mix: Mix, number: int) -> Request:
    """A prompt that nearly fills the context, and no limit: the context ends the text."""
    words = mix.context * 2 // 5
    text = render(f"{history(random, words)}\n\n{question(random)}")
    sampling = {"temperature": 0, "max_new_tokens": None, "ignore_eos": True}
    body = {"text": text, "sampling_params": sampling}
    return Request(number, "generate: greedy, to the context's end", "/generate", body)


def _session(random: Random, mix: Mix, number: int) -> Request:
    """Turns of greedy text; the answer to each becomes context of the next."""
    turns = (render(question(random)), *(f" {question(random)}" for _ in range(random.randrange(1, 3))))
    limit = random.randrange(2, 24)
    body = {"sampling_params": {"temperature": 0, "max_new_tokens": limit}}
    return Request(number, "session", "/generate", body, "session", answers=len(turns), limit=limit, turns=turns)


CONTROLS: tuple[tuple[str, tuple[tuple[str, str, dict[str, Any] | None], ...]], ...] = (
    (
        "pause in place",
        (("POST", "/pause_generation", {"mode": "in_place"}), ("POST", "/continue_generation", {})),
    ),
    (
        "pause, retract and flush",
        (
            ("POST", "/pause_generation", {"mode": "retract"}),
            ("POST", "/flush_cache", None),
            ("POST", "/continue_generation", {}),
        ),
    ),
    ("abort an unknown id", (("POST", "/abort_request", {"rid": "nobody"}),)),
    ("abort all", (("POST", "/abort_request", {"abort_all": True}),)),
    ("flush in vain", (("POST", "/flush_cache", None),)),
    ("server info", (("GET", "/get_server_info", None),)),
    ("metrics", (("GET", "/metrics", None),)),
    ("loads", (("GET", "/v1/loads", None),)),
    ("health", (("GET", "/health_generate", None),)),
    ("update weights", (("POST", "/update_weights_from_disk", {"model_path": ""}),)),
)
"""Control events in the middle of the load: name, and its steps (method, path, body)."""


def _control(random: Random, mix: Mix, number: int) -> Request:
    name, steps = random.choices(CONTROLS, (3, 3, 2, 1, 2, 2, 2, 2, 1, 1))[0]
    return Request(number, f"control: {name}", "", {"steps": [list(step) for step in steps]}, "control", answers=0)
