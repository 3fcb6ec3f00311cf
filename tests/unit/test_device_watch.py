"""Whether a device waits for its host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_orthrus.round.device_watch import DeviceWatch


def test_a_cpu_has_always_run_what_was_queued() -> None:
    watch = DeviceWatch("cpu")
    assert watch.is_idle()
    watch.note_queued()
    assert watch.is_idle()


def test_a_device_is_idle_when_it_has_run_what_was_queued_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events of a device that this machine need not have."""
    queued, done = [0], [0]

    class Event:
        def record(self) -> None:
            self.at = queued[0]

        def query(self) -> bool:
            return done[0] >= self.at

    monkeypatch.setattr("torch.get_device_module", lambda device: SimpleNamespace(Event=Event))
    watch = DeviceWatch("cuda")
    assert watch.is_idle(), "nothing was queued"
    for number in (1, 2):
        queued[0] = number
        watch.note_queued()
        assert not watch.is_idle()
        done[0] = number
        assert watch.is_idle()
