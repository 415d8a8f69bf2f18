import pytest

from lightlm.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["The cat sat on the mat, and the dog didn't: naïve café, 3.14!\n\tNew line.  Two spaces. 日本語"] * 3


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)
