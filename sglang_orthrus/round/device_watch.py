"""Whether a device waits for its host."""

from __future__ import annotations

import torch


class DeviceWatch:
    """Tells whether all that was queued on a device has run, without waiting for it.

    Args:
        device: of the model. On a CPU everything runs at once.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._module = None if torch.device(device).type == "cpu" else torch.get_device_module(device)
        self._end: torch.Event | None = None

    def note_queued(self) -> None:
        """Work was queued on the current stream."""
        if self._module is not None:
            self._end = self._end or self._module.Event()
            self._end.record()

    def is_idle(self) -> bool:
        """Whether what was queued when that was last noted has run."""
        return self._end is None or bool(self._end.query())
