"""Starts the page and what it needs, and ends all of it."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from aiohttp import web

from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS, SERVER_ARGS
from sglang_orthrus.cli.play.app import application
from sglang_orthrus.cli.play.sides import ORTHRUS, PLAIN, Side, Stage, follow, launch
from sglang_orthrus.cli.server import HOST, Server, free_port, plain_env
from sglang_orthrus.models.checkpoint import export_ar

NO_PLAIN = (
    "No server of plain SGLang was named, so there is nothing to compare with. Start this page again with "
    "--plain-url URL, the address of a server of the same checkpoint without ORTHRUS."
)
# Two servers on one GPU. Whoever has two GPUs, or a larger model, says otherwise.
_GPU_SHARE = ("--mem-fraction-static", "0.4")
_TELL_SECONDS = 0.5


def run(arguments: argparse.Namespace, extra: Sequence[str]) -> int:
    """Serve the page until Ctrl-C.

    Raises:
        ValueError: arguments contradict each other.
        OSError: the page's port is taken.
    """
    if arguments.url and (arguments.checkpoint or extra):
        raise ValueError("--url names a running server; leave out the checkpoint and SGLang's flags")
    if arguments.plain_url and not arguments.url:
        raise ValueError("--plain-url needs --url, the server with ORTHRUS")
    with tempfile.TemporaryDirectory(prefix="orthrus-play-") as folder:
        if arguments.url:
            watchers = following(arguments.url, arguments.plain_url)
        else:
            watchers = launching(arguments.checkpoint, Path(folder), extra)
        with watched(watchers) as sides:
            asyncio.run(serve(sides, arguments.host, arguments.port))
    return 0


Watch = Callable[[threading.Event], None]


def following(url: str, plain_url: str | None) -> list[tuple[Side, Watch | None]]:
    """Running servers, and what watches them."""
    orthrus, plain = Side(ORTHRUS), Side(PLAIN)
    if plain_url is None:
        plain.tell(Stage.ABSENT, NO_PLAIN)
        return [(orthrus, partial(follow, orthrus, url)), (plain, None)]
    return [(orthrus, partial(follow, orthrus, url)), (plain, partial(follow, plain, plain_url))]


def launching(checkpoint: str | None, folder: Path, extra: Sequence[str]) -> list[tuple[Side, Watch | None]]:
    """Servers to start, and what starts and watches them.

    Args:
        folder: where the autoregressive view goes, which plain SGLang serves.
        extra: SGLang's flags for both.
    """
    model = checkpoint or str(NANO)
    source = checkpoint_folder(model)
    shared = [*SERVER_ARGS, *gpu_share(extra), *extra]
    ports = list(_ports(4))
    orthrus_args = (*ORTHRUS_ARGS, "--enable-metrics", *shared, "--nccl-port", str(ports[0]))
    plain_args = (*shared, "--nccl-port", str(ports[1]))

    def make_orthrus(progress: Callable[[float, str], None]) -> Server:
        return Server(model, *orthrus_args, port=ports[2], progress=progress)

    def make_plain(progress: Callable[[float, str], None]) -> Server:
        exported = export_ar(source, folder / f"{Path(model).name}-ar")
        return Server(exported, *plain_args, port=ports[3], env=plain_env(), progress=progress)

    orthrus, plain = Side(ORTHRUS), Side(PLAIN)
    return [(orthrus, partial(launch, orthrus, make_orthrus)), (plain, partial(launch, plain, make_plain))]


def checkpoint_folder(model: str) -> Path:
    """Where a checkpoint lies; one that is named as on the Hub is fetched first, as SGLang would."""
    if Path(model).is_dir():
        return Path(model)
    if model.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no checkpoint directory {model}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model))


def gpu_share(extra: Sequence[str]) -> tuple[str, ...]:
    """The flag that lets two servers share a GPU, unless the user has a wish, or there is none."""
    import torch

    is_given = any(flag.startswith(_GPU_SHARE[0]) for flag in extra)
    return _GPU_SHARE if torch.cuda.is_available() and not is_given else ()


@contextmanager
def watched(watchers: Sequence[tuple[Side, Watch | None]]) -> Iterator[dict[str, Side]]:
    """The sides by name, while their threads run. All servers that these have started are stopped in the end."""
    stop = threading.Event()
    threads = [threading.Thread(target=watch, args=(stop,)) for _, watch in watchers if watch is not None]
    for thread in threads:
        thread.start()
    try:
        yield {side.name: side for side, _ in watchers}
    finally:
        stop.set()
        for thread in threads:
            thread.join()


async def serve(sides: Mapping[str, Side], host: str, port: int) -> None:
    """Serve the page until cancelled, and say on the terminal how far the servers are."""
    app = application(sides, is_local=host == HOST)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        print(f"the page: http://{host}:{port}  (Ctrl-C ends it, and every server that it started)", flush=True)
        await tell(sides)
    finally:
        await runner.cleanup()


async def tell(sides: Mapping[str, Side]) -> None:
    """Print each change of a server's stage, for ever."""
    told: dict[str, str] = {}
    while True:
        for name, side in sides.items():
            state = side.state()
            if told.get(name) != state["stage"]:
                told[name] = state["stage"]
                details = state["url"] if side.is_ready else state["words"]
                print(f"{name:<8} {state['stage']}  {details or ''}".rstrip(), flush=True)
        await asyncio.sleep(_TELL_SECONDS)


def _ports(count: int) -> set[int]:
    """Different ones, as servers that start at once bind theirs only seconds later."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return ports
