"""`python -m sglang_orthrus doctor [SGLang flags]`: on one screen, what would keep ORTHRUS from starting."""

from __future__ import annotations

import io
import logging
import os
import platform
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sglang_orthrus import __version__
from sglang_orthrus.models.checkpoint import check_tensors, diff_tensor_names, tensor_names

LIBRARIES = ("torch", "flashinfer-python", "transformers", "xgrammar")
PLUGIN = "orthrus"
CPU_PLATFORM = "orthrus_cpu"

_WIDTH = 100
_LONGEST_FINDING = 600


class Status(StrEnum):
    """What a check found."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Check:
    """One entry of the report. A FAIL keeps ORTHRUS from starting."""

    status: Status
    subject: str
    finding: str

    def __str__(self) -> str:
        lead = f"{self.status:<5} {self.subject:<11} "
        text = textwrap.shorten(self.finding, _LONGEST_FINDING, placeholder=" ...")
        return textwrap.fill(text, _WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead))


def run(flags: Sequence[str]) -> int:
    """Print the report on a server with these flags, and return the exit status: 0 if it would start."""
    # SGLang's imports and argument resolution log a lot; what matters of it is in the findings.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        checks = list(examine(flags))
    print(f"sglang-orthrus {__version__}, Python {platform.python_version()}, {sys.executable}")
    for check in checks:
        print(check)
    problems = sum(check.status is Status.FAIL for check in checks)
    if problems:
        print(f"ORTHRUS would not start: {problems} problem{'s' * (problems > 1)}.")
        return 1
    print("Nothing here would keep ORTHRUS from starting.")
    return 0


def examine(flags: Sequence[str]) -> Iterator[Check]:
    """Every check in order, up to one without which the next would only fail alike."""
    for subject, look in (
        ("sglang", lambda: [sglang_check()]),
        ("libraries", lambda: [libraries_check({name: _installed(name) for name in LIBRARIES}, requires("sglang"))]),
        ("device", lambda: [device_check()]),
        ("plugin", lambda: [plugin_check()]),
        ("flags", lambda: list(argument_checks(flags))),
    ):
        try:
            found = look()
        except Exception as error:  # noqa: BLE001 (the report must not end in a traceback)
            yield Check(Status.FAIL, subject, describe(error))
            return
        yield from found
        if subject != "device" and any(check.status is Status.FAIL for check in found):
            return


def sglang_check() -> Check:
    """Is the installed SGLang the supported one?"""
    from sglang_orthrus.compat.versions import SUPPORTED_SGLANG, require_supported_sglang

    found = _installed("sglang")
    if found is None:
        return Check(Status.FAIL, "sglang", f"not installed here: pip install sglang=={SUPPORTED_SGLANG}")
    try:
        require_supported_sglang()
    except ValueError as error:
        return Check(Status.FAIL, "sglang", str(error))
    return Check(Status.OK, "sglang", found)


def libraries_check(installed: Mapping[str, str | None], requirements: Iterable[str] | None) -> Check:
    """Are the libraries those that SGLang asks for? installed: name and version; requirements: as in its metadata."""
    wanted = {
        canonicalize_name(required.name): required.specifier
        for required in map(Requirement, requirements or ())
        if required.marker is None or required.marker.evaluate({"extra": ""})
    }
    wrong = [
        f"{name} {found or 'missing'} (sglang wants {want})"
        for name, found in installed.items()
        if (want := wanted.get(canonicalize_name(name))) and not (found and want.contains(found, prereleases=True))
    ]
    if wrong:
        return Check(Status.WARN, "libraries", f"{', '.join(wrong)}: pip install sglang=={_installed('sglang')}")
    return Check(Status.OK, "libraries", ", ".join(f"{name} {found}" for name, found in installed.items()))


def device_check() -> Check:
    """What SGLang would run on."""
    import torch

    with _logged("sglang.srt.platforms", "sglang.srt.plugins") as records:
        from sglang.srt.platforms import current_platform
    active = type(current_platform).__name__
    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        gpu = f"{torch.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free"
        return Check(Status.OK, "device", f"{gpu}; platform {active}")
    if active == "OrthrusCpuPlatform":
        return Check(Status.OK, "device", f"no GPU, {os.cpu_count()} CPU cores; platform {CPU_PLATFORM}")
    reason = why_no_cpu_platform(os.environ, records, active)
    return Check(Status.FAIL, "device", f"PyTorch finds no GPU, and the platform {CPU_PLATFORM} is off: {reason}")


def why_no_cpu_platform(environment: Mapping[str, str], records: Sequence[logging.LogRecord], active: str) -> str:
    """Why the CPU platform is not the active one, and what to do. records: what SGLang logged while choosing."""
    if environment.get("SGLANG_USE_CPU_ENGINE") == "1":
        return "SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU kernels; unset it."
    selected = environment.get("SGLANG_PLATFORM", CPU_PLATFORM)
    if selected != CPU_PLATFORM:
        return f"SGLANG_PLATFORM={selected} selects another; set it to {CPU_PLATFORM}."
    return swallowed(records, CPU_PLATFORM) or f"{active} is active; set SGLANG_PLATFORM={CPU_PLATFORM}."


def plugin_check() -> Check:
    """Is the algorithm registered? SGLang loads the plugin as it would in a server."""
    with _logged("sglang.srt.plugins") as records:
        from sglang.srt.plugins import load_plugins

        load_plugins()
    from sglang.srt.speculative.spec_registry import get_spec

    from sglang_orthrus.server_args.algorithm import NAME

    if get_spec(NAME) is not None:
        return Check(Status.OK, "plugin", f"--speculative-algorithm {NAME} is registered")
    missing = f"{sys.executable} knows no plugin {PLUGIN}: pip install sglang-orthrus with it."
    return Check(Status.FAIL, "plugin", swallowed(records, PLUGIN) or missing)


def swallowed(records: Sequence[logging.LogRecord], plugin: str) -> str | None:
    """Why SGLang went on without a plugin, from what it logged; None if it says nothing of it."""
    for record in records:
        if not isinstance(record.args, tuple) or plugin not in record.args:
            continue
        if record.exc_info and record.exc_info[1]:
            return f"{record.getMessage()}: {describe(record.exc_info[1])}"
        if record.msg.startswith("Skipping"):
            variable = "SGLANG_PLATFORM" if "SGLANG_PLATFORM" in record.msg else "SGLANG_PLUGINS"
            advice = f"add {plugin} to it or unset it" if variable == "SGLANG_PLUGINS" else "unset it"
            return f"{variable}={os.environ.get(variable)} leaves {plugin} out; {advice}."
    return None


def argument_checks(flags: Sequence[str]) -> Iterator[Check]:
    """The checkpoint, the attention backend and every refused flag, resolved as a server would."""
    from sglang_orthrus.server_args.algorithm import NAME
    from sglang_orthrus.server_args.refusals import flag_refusals

    try:
        args = parse(flags)
    except ValueError as error:
        yield Check(Status.FAIL, "flags", str(error))
        return
    if str(args.speculative_algorithm).upper() != NAME:
        yield Check(Status.WARN, "flags", f"--speculative-algorithm is {args.speculative_algorithm}, not {NAME}")
        return
    if is_absent_directory(args.model_path):
        yield Check(Status.FAIL, "checkpoint", f"--model-path {args.model_path}: no such directory")
        found = problems = list(flag_refusals(args))
    else:
        found = argument_problems(args)
        yield (checkpoint := checkpoint_check(args))
        # The resolution reads the checkpoint, too, and complains of it in the same words.
        problems = [problem for problem in found if checkpoint.finding not in problem]
    for problem in problems:
        yield Check(Status.FAIL, "flags", problem)
    # A resolution that the checkpoint ended has not come to all flags.
    if not found:
        yield Check(Status.OK, "attention", attention_backends(args))
        yield Check(Status.OK, "flags", f"none refused: {' '.join(flags)}" if flags else "none given")


def parse(flags: Sequence[str]) -> Any:
    """SGLang's `ServerArgs`. Without a checkpoint the bundled one is taken, without an algorithm ORTHRUS.

    Raises:
        ValueError: with the parser's complaint.
    """
    from sglang.srt.server_args import prepare_server_args

    from sglang_orthrus.cli.demo import NANO
    from sglang_orthrus.server_args.algorithm import NAME

    # A later flag overrides an earlier one, but a flag overrides a configuration file.
    defaults = () if "--config" in flags else ("--model-path", str(NANO), "--speculative-algorithm", NAME)
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return prepare_server_args([*defaults, *flags])
    except SystemExit:
        lines = complaint.getvalue().strip().splitlines()
        raise ValueError(lines[-1] if lines else "the flags ask for no server") from None


def argument_problems(args: Any) -> list[str]:
    """Our refusals, then SGLang's complaint if it has one. Resolves the arguments."""
    from sglang_orthrus.server_args.refusals import Refused, flag_refusals

    # Once more before the resolution: a check of SGLang's may end it before it comes to ours.
    problems = dict.fromkeys(flag_refusals(args))
    try:
        args.resolve_once()
        args.check_server_args()
    except Refused as refused:
        problems |= dict.fromkeys(refused.sentences)
    except Exception as error:  # noqa: BLE001 (whatever SGLang raises is the finding)
        problems[describe(error)] = None
    return list(problems)


def attention_backends(args: Any) -> str:
    """The backend that resolved arguments lead to, or both."""
    from sglang.srt.arg_groups.model_override_base import attention_backends_of, resolved_view

    prefill, decode = attention_backends_of(resolved_view(args))
    return str(prefill) if prefill == decode else f"prefill {prefill}, decode {decode}"


def is_absent_directory(path: str) -> bool:
    """Whether this can only be a local path, and nothing is there."""
    return path.startswith(("/", ".", "~")) and not Path(path).exists()


def checkpoint_check(args: Any) -> Check:
    """Is the checkpoint a complete Orthrus one? Its tensors are looked at only if it is a local directory."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    from sglang_orthrus.server_args.refusals import dual_view

    try:
        config = dual_view(args)
        layers = model_config_of(args).hf_config.num_hidden_layers
        tensors = _tensors(args, layers)
    except Exception as error:  # noqa: BLE001 (a damaged file can raise anything)
        # Our own complaints are sentences, whose type says nothing.
        return Check(Status.FAIL, "checkpoint", str(error) if type(error) is ValueError else describe(error))
    shape = f"block_size {config.block_size}, mask_token_id {config.mask_token_id}"
    return Check(Status.OK, "checkpoint", f"{args.model_path}: {shape}, {tensors}")


def _tensors(args: Any, layers: int) -> str:
    if args.load_format == "dummy" or not Path(args.model_path).is_dir():
        return "tensors not checked"
    check_tensors(tensor_names(args.model_path), layers)
    return f"{len(diff_tensor_names(layers))} *_diff tensors"


def describe(error: BaseException) -> str:
    """The last line of its traceback, or the failed source line of a bare assertion."""
    text = str(error)
    if not text and error.__traceback__:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"
    return f"{type(error).__name__}: {text}"


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _logged(*names: str) -> Iterator[list[logging.LogRecord]]:
    """What these loggers say meanwhile."""
    handler = _Recorder()
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield handler.records
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
