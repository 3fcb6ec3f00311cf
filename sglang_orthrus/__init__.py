"""Serve Orthrus dual-view diffusion-drafting models from SGLang."""

__version__ = "0.1.0"
