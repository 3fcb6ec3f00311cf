"""Reading the diffusion view's shape from a configuration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_orthrus.config import SPEED_FLOOR, WIDTHS, DualViewConfig, is_orthrus, speed_floor, widths_from_env


def test_the_released_values_are_read() -> None:
    hf_config = SimpleNamespace(block_size=32, mask_token_id=151669, vocab_size=151936)
    assert DualViewConfig.from_hf(hf_config) == DualViewConfig(32, 151669)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mask_token_id": 3}, "no block_size"),
        ({"block_size": 32}, "no mask_token_id"),
        ({}, "no block_size and no mask_token_id"),
        ({"block_size": 1, "mask_token_id": 3}, "block_size is 1"),
        ({"block_size": 32, "mask_token_id": 100}, "mask_token_id 100"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_by_name(values: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DualViewConfig.from_hf(SimpleNamespace(vocab_size=100, **values))


@pytest.mark.parametrize("name", ["OrthrusLM", "OrthrusForCausalLM"])
def test_the_architecture_decides_not_the_model_type(name: str) -> None:
    assert is_orthrus(SimpleNamespace(architectures=[name], model_type="qwen3"))
    assert not is_orthrus(SimpleNamespace(architectures=["Qwen3ForCausalLM"], model_type="qwen3"))
    assert not is_orthrus(SimpleNamespace(architectures=None))


@pytest.mark.parametrize(
    ("value", "largest", "expected"),
    [
        (None, 32, (1, 8, 16, 32)),
        (None, 48, (1, 8, 16, 32, 48)),
        (None, 16, (1, 8, 16)),
        (None, 12, (1, 8, 12)),
        (None, 4, (1, 4)),
        ("largest", 32, (32,)),
        ("32", 32, (32,)),
        ("16,1,32,16", 32, (1, 16, 32)),
    ],
)
def test_widths_follow_traffic_unless_one_is_fixed(
    value: str | None, largest: int, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WIDTHS, raising=False)
    if value is not None:
        monkeypatch.setenv(WIDTHS, value)
    assert widths_from_env(largest) == expected


@pytest.mark.parametrize("value", ["", "all", "0,32", "8,,32", "1,8"])
def test_other_widths_are_refused_with_the_value_and_the_fix(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WIDTHS, value)
    with pytest.raises(ValueError, match=f"ORTHRUS_WIDTHS={value}: .*32"):
        widths_from_env(32)


def test_the_floor_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPEED_FLOOR, raising=False)
    assert speed_floor() == 0.88
    for value in ("0", "0.5", "1"):
        monkeypatch.setenv(SPEED_FLOOR, value)
        assert speed_floor() == float(value)
    for value in ("-0.1", "87", "nan", "low"):
        monkeypatch.setenv(SPEED_FLOOR, value)
        with pytest.raises(ValueError, match=f"ORTHRUS_SPEED_FLOOR={value}: use a share from 0, for none, to 1"):
            speed_floor()
