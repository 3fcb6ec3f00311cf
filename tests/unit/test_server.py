"""The server context manager, with small scripts in the place of SGLang."""

from __future__ import annotations

import os
import socket
import textwrap
import time
from pathlib import Path

import pytest

from sglang_orthrus.cli.server import HOST, Server, ServerError, free_port

ANSWERS = """
    import subprocess, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    stubborn = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn])
    print("child", child.pid, flush=True)
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that `python -m sglang.launch_server` runs instead of SGLang's."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "sglang" / "launch_server.py"


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie waits for its parent and runs nothing


def test_stopping_ends_children_that_ignore_signals(script: Path, tmp_path: Path) -> None:
    script.write_text(textwrap.dedent(ANSWERS))
    with Server("model", log_path=tmp_path / "log") as server:
        assert server.is_running
        child = int(server.log_tail().split("child ")[1].split()[0])
        assert is_alive(child)
    assert not server.is_running
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
    server.stop()  # harmless


def test_a_server_that_dies_is_reported_with_its_log(script: Path, tmp_path: Path) -> None:
    script.write_text("import sys; print('no such model'); sys.exit(3)")
    with pytest.raises(ServerError, match=r"(?s)exited with status 3.*--sleep-on-idle --x.*no such model"):
        Server("model", "--x", log_path=tmp_path / "log").start()


def test_a_server_that_does_not_answer_is_stopped(script: Path, tmp_path: Path) -> None:
    script.write_text("import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)")
    shown: list[str] = []
    server = Server("model", log_path=tmp_path / "log", timeout=1.5, progress=lambda seconds, line: shown.append(line))
    with pytest.raises(ServerError, match=r"did not answer within 2 s"):
        server.start()
    assert any(line.startswith("pid ") for line in shown)
    assert not is_alive(int(server.log_tail().split()[1]))


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is in use"):
            Server("model", port=port).start()


def test_the_environment_is_extended(script: Path, tmp_path: Path) -> None:
    script.write_text("import os; print(os.environ['ADDED'], 'HOME' in os.environ)")
    assert "HOME" in os.environ
    with pytest.raises(ServerError, match="yes True"):
        Server("model", env={"ADDED": "yes"}, log_path=tmp_path / "log").start()


def test_free_ports_are_free_and_outside_the_ranges_that_others_draw_from() -> None:
    port = free_port()
    assert 10000 <= port < 20000
    with socket.socket() as probe:
        probe.bind((HOST, port))
