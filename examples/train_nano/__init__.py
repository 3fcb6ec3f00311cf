"""Trains orthrus-nano, the small Orthrus checkpoint that ships with sglang-orthrus, from scratch."""
