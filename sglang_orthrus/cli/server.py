"""A SGLang server as a context manager: started on a free port, watched, stopped with all its children."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

HOST = "127.0.0.1"
Progress = Callable[[float, str], None]

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_LOG_TAIL = 30
_POLL_SECONDS = 0.5
_TERM_GRACE_SECONDS = 5.0


class ServerError(RuntimeError):
    """The server could not be started; the message ends with the last lines of its log."""


class Server:
    """`python -m sglang.launch_server` on a free local port, in a session of its own.

        with Server("path/to/checkpoint", "--speculative-algorithm", "ORTHRUS") as server:
            server.post("/generate", {"text": "Hello"})

    Args:
        model: checkpoint directory or model name.
        args: further command-line arguments. `--sleep-on-idle` is always passed: an idle SGLang scheduler
            otherwise spins on a core.
        port: the port to serve on; a free one by default.
        env: environment variables on top of this process's.
        log_path: where stdout and stderr go; a new temporary file by default.
        timeout: seconds to wait until the server answers.
        progress: called about twice a second while waiting, with the seconds passed and the log's last line.
    """

    def __init__(
        self,
        model: str | Path,
        *args: str,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        timeout: float = 300.0,
        progress: Progress | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://{HOST}:{self.port}"
        self.log_path = log_path or _temporary_log()
        self.command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)),
            *("--host", HOST, "--port", str(self.port), "--sleep-on-idle", *args),
        ]
        self._env = {**os.environ, **(env or {})}
        self._timeout = timeout
        self._progress = progress
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it serves.

        Raises:
            ServerError: if it exits or does not answer in time, or the port is taken. Nothing is left running.
        """
        if not _is_free(self.port):
            raise ServerError(f"port {self.port} is in use; choose another one")
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C reaches us alone, and we stop the whole group
                preexec_fn=_die_with_parent,
            )
        atexit.register(self.stop)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and every process it started. Harmless when it is not running."""
        if self._process is None:
            return
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        # SGLang's main process ends its children itself when asked; whatever is left then is killed.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERM_GRACE_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()

    @property
    def is_running(self) -> bool:
        """Whether the main process is alive."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = _LOG_TAIL) -> str:
        """The last lines of the server's log."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def post(self, path: str, body: Mapping[str, Any], *, timeout: float = 300.0) -> Any:
        """POST JSON and return the decoded answer. Raises requests.HTTPError on an error status."""
        response = requests.post(self.url + path, json=body, timeout=timeout)
        response.raise_for_status()
        return response.json()

    def get(self, path: str, *, timeout: float = 60.0) -> requests.Response:
        """GET a path. Raises requests.HTTPError on an error status."""
        response = requests.get(self.url + path, timeout=timeout)
        response.raise_for_status()
        return response

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        started = time.monotonic()
        while not self._answers():
            elapsed = time.monotonic() - started
            if process.poll() is not None:
                raise ServerError(self._failure(f"exited with status {process.returncode} after {elapsed:.0f} s"))
            if elapsed > self._timeout:
                raise ServerError(self._failure(f"did not answer within {self._timeout:.0f} s"))
            if self._progress is not None:
                self._progress(elapsed, self.log_tail(1))
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        try:
            return bool(requests.get(self.url + "/health", timeout=10).status_code == requests.codes.ok)
        except requests.RequestException:
            return False

    def _failure(self, what: str) -> str:
        command = " ".join(self.command)
        return f"the server {what}.\ncommand: {command}\nlog: {self.log_path}\n...\n{self.log_tail()}"


def plain_env() -> dict[str, str]:
    """Environment in which SGLang runs without this package's plugin: its own models and algorithms only.

    Where no accelerator is visible the CPU platform is kept, as SGLang could not start without one.
    """
    import torch

    platform = {} if torch.cuda.is_available() else {"SGLANG_PLATFORM": "orthrus_cpu"}
    return {"SGLANG_PLUGINS": "__none__", **platform}


def free_port(low: int = 10000, high: int = 19999) -> int:
    """A port that nothing listens on.

    NOTE: the server binds it only seconds later, so it lies outside the kernel's ephemeral range (32768 and
    up) and SGLang's own for rendezvous (22000 to 29999), and is random: servers starting together differ.
    """
    for port in random.sample(range(low, high), 100):
        if _is_free(port):
            return port
    raise ServerError(f"found no free port between {low} and {high}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT can be bound again
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="sglang-orthrus-", suffix=".log")
    os.close(handle)
    return Path(name)


def _die_with_parent() -> None:
    """In the child: ask the kernel for a SIGTERM should our process be killed outright."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(group: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)
