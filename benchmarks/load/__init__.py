"""Widths of rounds under load."""
