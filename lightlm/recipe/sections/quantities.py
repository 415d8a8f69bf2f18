"""The types are in `lightlm.spans`."""

from lightlm.spans import BatchTokens, Span, Tokens, span_tokens

__all__ = ["BatchTokens", "Span", "Tokens", "span_tokens"]
