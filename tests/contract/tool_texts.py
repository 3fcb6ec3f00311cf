"""Tool calls as models of many families write them."""
# ruff: noqa: RUF001

from __future__ import annotations

import json
from typing import Any

Call = tuple[str, dict[str, Any]]
_DSML = "｜DSML｜"


def _json(call: Call, key: str = "arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]}, ensure_ascii=False)


def _tags(call: Call, begin: str, parameter: str, parameter_end: str, end: str) -> str:
    name, arguments = call
    return (
        begin % name + "".join(parameter % key + str(value) + parameter_end for key, value in arguments.items()) + end
    )


def _python(call: Call) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


def text_of(kind: str, calls: list[Call]) -> str:
    """An answer that makes these calls, with text before them where the format allows any.

    Raises:
        KeyError: for a format that is not written down here.
    """
    glm = [_tags(call, "<tool_call>%s\n", "<arg_key>%s</arg_key>\n<arg_value>", "</arg_value>\n", "") for call in calls]
    function = [_tags(call, "<function=%s>\n", "<parameter=%s>\n", "\n</parameter>\n", "</function>") for call in calls]
    invoke = f'<{_DSML}invoke name="%s">\n', f'<{_DSML}parameter name="%s" string="true">', f"</{_DSML}parameter>\n"
    dsml = "".join(_tags(call, *invoke, f"</{_DSML}invoke>\n") for call in calls)
    named = [_json(call) for call in calls]
    step = '<steptml:invoke name="%s">', '<steptml:parameter name="%s">', "</steptml:parameter>", "</steptml:invoke>"
    return {
        "qwen25": "Well. " + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in named),
        "hermes": "Well. " + "".join(f"<tool_call>{call}</tool_call>" for call in named),
        "llama3": "<|python_tag|>" + ";".join(named),
        "mistral": "Well. " + "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(args)}" for name, args in calls),
        "interns1": f"Well. <|action_start|> <|plugin|>\n{_json(calls[0], 'parameters')}<|action_end|>\n",
        "deepseekv32": f"Well. <{_DSML}function_calls>\n{dsml}</{_DSML}function_calls>",
        "qwen3_coder": "Well. " + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in function),
        "glm45": "Well. " + "\n".join(f"{call}</tool_call>" for call in glm),
        "poolside_v1": "Well. " + "\n".join(f"{call}</tool_call>" for call in glm),
        "pythonic": f"[{', '.join(map(_python, calls))}]",
        "lfm2": f"Well. <|tool_call_start|>[{', '.join(map(_python, calls))}]<|tool_call_end|> Done.",
        "apertus2509": f"Well. <|tools_prefix|>{json.dumps([{name: args} for name, args in calls])}<|tools_suffix|>",
        "step3": "Well. <｜tool_calls_begin｜>"
        + "".join(f"<｜tool_call_begin｜>function<｜tool_sep｜>{_tags(c, *step)}<｜tool_call_end｜>" for c in calls)
        + "<｜tool_calls_end｜>",
        "minicpm5": "Well. "
        + "".join(_tags(c, '<function name="%s">', '<param name="%s">', "</param>", "</function>") for c in calls),
        "dots": "Well. " + "".join(f"<dots_function_call>{call}</dots_function_call>" for call in named),
        "gigachat3": f"Well. function call<|role_sep|>\n{named[0]}",
    }[kind]


KINDS = (
    *("qwen25", "hermes", "llama3", "mistral", "interns1", "deepseekv32", "qwen3_coder", "glm45", "poolside_v1"),
    *("pythonic", "lfm2", "apertus2509", "step3", "minicpm5", "dots", "gigachat3"),
)
