"""The types are in `lightlm.quantities`."""

from lightlm.quantities import BatchTokens, Span, Tokens, span_tokens

__all__ = ["BatchTokens", "Span", "Tokens", "span_tokens"]
