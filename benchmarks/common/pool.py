"""Whether a server's KV pool is whole again once nobody uses it."""

from __future__ import annotations

import time
from typing import Any

import requests

PATIENCE_SECONDS = 120.0


class PoolError(AssertionError):
    """Slots of the pool are held by nobody; the message has the numbers."""


def gauge(url: str, name: str) -> float:
    """One of SGLang's metrics, summed over its labels."""
    lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"sglang:{name}{{"))


def load(url: str) -> dict[str, Any]:
    """The scheduler's own account of what it holds, asked for now."""
    response = requests.get(f"{url}/v1/loads", timeout=60)
    response.raise_for_status()
    found: dict[str, Any] = response.json()["loads"][0]
    return found


def wait_until_idle(url: str, patience: float = PATIENCE_SECONDS) -> dict[str, Any]:
    """The load once no request runs, waits or holds a slot.

    Raises:
        PoolError: if that takes longer than `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        found = load(url)
        held = {name: found[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")}
        if not any(held.values()):
            return found
        if time.monotonic() > deadline:
            raise PoolError(f"still {held} after {patience:.0f} s without requests")
        time.sleep(0.05)
