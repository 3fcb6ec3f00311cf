"""Serve Orthrus dual-view diffusion-drafting models from SGLang."""

__version__ = "0.2.0"
