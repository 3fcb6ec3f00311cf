"""The command's arguments, apart from what runs it: they are read before anything heavy is imported."""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

from sglang_orthrus.cli.server import HOST

PORT = 30080


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; what SGLang knows goes to the servers that are started."""
    parser.add_argument("checkpoint", nargs="?", help="an Orthrus checkpoint to serve (default: the bundled one)")
    parser.add_argument("--url", type=server_url, help="a running server with ORTHRUS, instead of starting servers")
    parser.add_argument("--plain-url", type=server_url, help="a running server of plain SGLang to compare with")
    parser.add_argument("--port", type=int, default=PORT, help=f"of the page (default: {PORT})")
    parser.add_argument("--host", default=HOST, help=f"address to serve the page on (default: {HOST}, this machine)")


def server_url(text: str) -> str:
    """A server's address, as other commands take it, too: with or without `/v1`.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise argparse.ArgumentTypeError(f"{text} is no address of a server, such as http://127.0.0.1:30000")
    return text.rstrip("/").removesuffix("/v1")
