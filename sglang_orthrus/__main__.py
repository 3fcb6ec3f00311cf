"""Command line: `python -m sglang_orthrus demo | serve | play | doctor | export-ar | graft`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from sglang_orthrus.cli.play import arguments as play
from sglang_orthrus.cli.server import Server, ServerError
from sglang_orthrus.models.checkpoint import export_ar

_CURL = """curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "default", "messages": [{{"role": "user", "content": "How do you work?"}}]}}'"""


def serve(model: str | None, port: int, extra: list[str]) -> int:
    """Run an ORTHRUS server in the foreground until Ctrl-C; `extra` goes to SGLang as it is."""
    from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS, SERVER_ARGS, Waiting, clear_line

    chosen = model or str(NANO)
    with Server(chosen, *ORTHRUS_ARGS, *SERVER_ARGS, *extra, port=port, progress=Waiting("ORTHRUS")) as server:
        print(f"{clear_line()}serving {chosen}  log: {server.log_path}\ntry:\n{_CURL.format(url=server.url)}")
        print("Ctrl-C stops it.", flush=True)
        while server.is_running:
            time.sleep(1)
        print(f"the server ended by itself:\n{server.log_tail()}", file=sys.stderr)
    return 1


def grafted(arguments: argparse.Namespace) -> int:
    """Write a grafted checkpoint, with a progress bar, and say how to serve it."""
    from tqdm import tqdm

    from sglang_orthrus.models.graft import graft

    with tqdm(unit=" tensors", desc="graft", disable=None) as bar:
        target = graft(
            arguments.base, arguments.orthrus, arguments.target, arguments.adapter, lambda name: bar.update() or None
        )
    print(
        f"{target}\nserve it:\n  python -m sglang.launch_server --model-path {target} --speculative-algorithm ORTHRUS"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the command, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang_orthrus", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="compare the bundled checkpoint with and without ORTHRUS")
    serving = commands.add_parser("serve", help="serve a checkpoint (default: the bundled one) with ORTHRUS")
    serving.add_argument("model", nargs="?", help="checkpoint directory or model name")
    serving.add_argument("--port", type=int, default=30000)
    play.add_arguments(commands.add_parser("play", help="a page that shows both answers to a request, side by side"))
    examining = commands.add_parser(
        "doctor", help="tell what would keep ORTHRUS from starting with the SGLang flags that follow"
    )
    examining.add_argument("--url", help="tell what a running server says of its rounds instead")
    exporting = commands.add_parser("export-ar", help="write a checkpoint's autoregressive view as plain Qwen3")
    exporting.add_argument("source", type=Path)
    exporting.add_argument("target", type=Path)
    grafting = commands.add_parser("graft", help="give a fine-tuned Qwen3 the diffusion view of an Orthrus checkpoint")
    grafting.add_argument("base", type=Path, help="the fine-tune, a checkpoint directory")
    grafting.add_argument("orthrus", type=Path, help="an Orthrus checkpoint of the same shape")
    grafting.add_argument("target", type=Path, help="the directory to write")
    grafting.add_argument("--adapter", type=Path, help="a PEFT LoRA adapter to merge into the fine-tune")
    arguments, extra = parser.parse_known_args(argv)
    if extra and arguments.command not in ("serve", "play", "doctor"):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")

    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        if arguments.command == "export-ar":
            print(export_ar(arguments.source, arguments.target))
            return 0
        if arguments.command == "graft":
            return grafted(arguments)
        if arguments.command == "serve":
            return serve(arguments.model, arguments.port, extra)
        if arguments.command == "play":
            from sglang_orthrus.cli.play.run import run

            return run(arguments, extra)
        if arguments.command == "doctor":
            # The doctor imports SGLang only where a failure of that is a finding.
            if arguments.url:
                from sglang_orthrus.cli import running

                return running.run(arguments.url)
            from sglang_orthrus.cli import doctor

            return doctor.run(extra)
        from sglang_orthrus.cli import demo

        return demo.run()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _exit_on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
