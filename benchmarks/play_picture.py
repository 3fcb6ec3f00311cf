"""Takes the README's picture of the page that `make play` serves: `python -m benchmarks.play_picture [PNG]`."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.common.browser import NoBrowserError, ask, browser, chromium, opened, playing

TARGET = Path(__file__).resolve().parents[1] / "docs" / "img" / "play.png"
WINDOW = {"width": 1280, "height": 910}


def main(target: Path) -> int:
    """Start the page with its servers, ask for one example, and save what it shows."""
    try:
        path = chromium()
    except NoBrowserError as error:
        print(error, file=sys.stderr)
        return 1
    with browser(path) as running, playing() as (url, _), opened(running, url, viewport=WINDOW) as page:
        # The first request of a server is slower than the others.
        for _ in range(2):
            print(ask(page, "Think"), flush=True)
        page.mouse.move(0, 0)
        page.screenshot(path=target, animations="disabled")
    print(f"{target}: {target.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET))
