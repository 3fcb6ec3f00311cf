"""The version of SGLang that this package runs on."""

from __future__ import annotations

from importlib.metadata import version

SUPPORTED_SGLANG = "0.5.23"


def require_supported_sglang() -> None:
    """Refuse a version of SGLang that this package was not tested with.

    Raises:
        ValueError: naming both versions and the fix.
    """
    found = version("sglang")
    if found != SUPPORTED_SGLANG:
        raise ValueError(
            f"--speculative-algorithm ORTHRUS needs sglang {SUPPORTED_SGLANG}, but {found} is installed: "
            f"pip install sglang=={SUPPORTED_SGLANG}"
        )
