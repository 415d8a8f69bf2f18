"""The types are in `lightlm.quantities.types`."""

from lightlm.quantities.types import BatchTokens, Span, Tokens, span_tokens

__all__ = ["BatchTokens", "Span", "Tokens", "span_tokens"]
