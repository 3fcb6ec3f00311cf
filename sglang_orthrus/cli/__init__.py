"""The commands of `python -m sglang_orthrus`."""
