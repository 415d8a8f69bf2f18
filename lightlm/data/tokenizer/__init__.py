"""Tokenizers: text to token ids and back, and which tokenizer a name means."""

from lightlm.data.tokenizer.named import load_tokenizer, train_tokenizer
from lightlm.data.tokenizer.tokenizer import Tokenizer, token_text

__all__ = ["Tokenizer", "load_tokenizer", "token_text", "train_tokenizer"]
