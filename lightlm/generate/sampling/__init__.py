"""Sampling: the settings of `Sampling`, how each changes the logits, and the draw of the next token.

Importing this package imports no torch, so that mistakes in settings are reported immediately.
"""

from lightlm.generate.sampling.settings import DEFAULT, GREEDY, Sampling

__all__ = ["DEFAULT", "GREEDY", "Sampling"]
