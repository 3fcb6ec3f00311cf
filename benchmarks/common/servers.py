"""The servers that soak and fuzz load: ORTHRUS and plain SGLang on one checkpoint, given or started here."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import requests
import torch

from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS, SERVER_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar

COMMON_ARGS = (*SERVER_ARGS, "--enable-metrics", "--enable-custom-logit-processor")
# fp32, so that answers can be compared token by token. All slots of the pool are taken now and then.
CPU_ARGS = ("--dtype", "float32", "--context-length", "2048")
# With overlap plain SGLang penalises one token late (`patches/0005`).
PLAIN_ARGS = ("--disable-overlap-schedule",)
_MEBI = 1 << 20
_HEALTH_SECONDS = 120.0
_START_SECONDS = 600.0


class Side:
    """One of the two servers.

    Attributes:
        name: "orthrus" or "plain".
        weights: the checkpoint folder that it serves, for weight updates.
        starts: how often it was started here.
    """

    def __init__(self, name: str, url: str = "", server: Server | None = None, weights: str = "") -> None:
        self.name, self.server, self.weights = name, server, weights
        self.url = server.url if server is not None else url
        self.starts = 0

    def start(self) -> None:
        """Start or restart the server, if it is ours; end the program if another one lacks a flag."""
        if self.server is not None:
            self.server.stop()
            self.server.start()
            self.starts += 1
            return
        info = requests.get(f"{self.url}/server_info", timeout=_HEALTH_SECONDS).json()
        if lacking := lacking_flags(info):
            sys.exit(f"{self.url}: start this server with {' and '.join(lacking)}")

    def stop(self) -> None:
        """Stop the server, if it is ours."""
        if self.server is not None:
            self.server.stop()

    def is_alive(self) -> bool:
        """Whether it answers, with a token of the scheduler's."""
        body = {"text": "Hello", "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        with suppress(requests.RequestException):
            reply = requests.post(f"{self.url}/generate", json=body, timeout=_HEALTH_SECONDS)
            return bool(reply.status_code == requests.codes.ok)
        return False

    def log_tail(self) -> str:
        """The last lines of its log, if it is ours."""
        return self.server.log_tail() if self.server is not None else ""

    def last_error(self) -> str:
        """The last exception in its log, without time stamps."""
        if self.server is None:
            return ""
        lines = self.server.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line for line in lines if re.match(r"(\[[^]]*\] )?\w*(\.\w+)*(Error|Exception)\b", line)]
        return re.sub(r"^\[[^]]*\] ", "", found[-1])[:400] if found else ""


def lacking_flags(info: Mapping[str, Any]) -> list[str]:
    """Those of `COMMON_ARGS` that a server lacks, by its `/server_info`. Answers would look wrong without them."""
    flags = [part for part in COMMON_ARGS if part.startswith("--")]
    return [flag for flag in flags if not info.get(flag.removeprefix("--").replace("-", "_"))]


class Sides:
    """Both servers as a context manager; plain SGLang is absent if `plain` is false.

    Args:
        args: for both, beside `COMMON_ARGS` and, on a CPU, `CPU_ARGS`.
    """

    def __init__(
        self,
        model: Path = NANO,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        urls: tuple[str, str] = ("", ""),
        plain: bool = True,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        base = (*COMMON_ARGS, *(() if torch.cuda.is_available() else CPU_ARGS), *args)
        ours, theirs = urls
        if ours:
            self.orthrus = Side("orthrus", ours, weights=str(model))
        else:
            server = Server(model, *ORTHRUS_ARGS, *base, env=env, timeout=_START_SECONDS)
            self.orthrus = Side("orthrus", server=server, weights=str(model))
        self.plain: Side | None = None
        if theirs:
            self.plain = Side("plain", theirs)
        elif plain:
            exported = export_ar(model, Path(self._folder.name) / "ar")
            server = Server(exported, *base, *PLAIN_ARGS, env={**plain_env(), **(env or {})}, timeout=_START_SECONDS)
            self.plain = Side("plain", server=server, weights=str(exported))

    @property
    def all(self) -> list[Side]:
        """Those that there are."""
        return [self.orthrus] + ([self.plain] if self.plain is not None else [])

    def __enter__(self) -> Sides:
        try:
            for side in self.all:
                side.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for side in self.all:
            side.stop()
        self._folder.cleanup()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What soak and fuzz have in common."""
    parser.add_argument("--model", type=Path, default=NANO, help="a dual-view checkpoint; the bundled one by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-flight", type=int, default=16, help="requests at once; %(default)s by default")
    parser.add_argument("--server-arg", action="append", default=[], help="for both servers; repeatable")
    parser.add_argument("--url", default="", help="of an ORTHRUS server that runs; none is started then")
    parser.add_argument("--plain-url", default="", help="of a plain server that runs")
    parser.add_argument("--no-plain", action="store_true", help="without plain SGLang: nothing is compared")
    parser.add_argument("--results", type=Path, help="the JSON to write")


def sides_of(arguments: argparse.Namespace, args: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Sides:
    """The servers that the command line asks for. `args`: for both, before the user's own."""
    own = [part for text in arguments.server_arg for part in shlex.split(text)]
    urls = (arguments.url, arguments.plain_url)
    # A server that runs elsewhere has arguments that we don't know: no second one is started beside it.
    plain = not arguments.no_plain and not arguments.url
    return Sides(arguments.model, (*args, *own), env, urls, plain)


def resident_mib(url: str) -> dict[str, float]:
    """Resident memory of a server on this machine by process, in MiB; empty if it can't be found.

    Its main process is the one that listens on the port.
    """
    port = int(url.rpartition(":")[2])
    listening = {
        found.pid
        for found in psutil.net_connections("tcp")
        if found.laddr and found.laddr.port == port and found.pid and found.status == psutil.CONN_LISTEN
    }
    sizes: dict[str, float] = {}
    for pid in listening:
        with suppress(psutil.Error):
            main = psutil.Process(pid)
            for process in [main, *main.children(recursive=True)]:
                name = (process.cmdline() or [process.name()])[0].split("/")[-1]
                label = name if name.startswith("sglang::") else "main" if process == main else "other"
                sizes[label] = round(sizes.get(label, 0.0) + process.memory_info().rss / _MEBI, 2)
    return sizes
