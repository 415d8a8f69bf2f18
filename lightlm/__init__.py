"""LightLM: a toolkit for language models under 150M parameters."""

__version__ = "0.1.0"
