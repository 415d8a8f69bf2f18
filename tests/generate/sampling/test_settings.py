import pytest

from lightlm.errors import UsageError
from lightlm.generate.sampling import DEFAULT, Sampling


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top-k must be at least 1, is 0; leave it out"),
        ({"top_k": 2.5}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.01}, "top-p"),
        ({"min_p": 1.01}, "min-p"),
        ({"min_p": float("nan")}, "min-p"),
        ({"typical_p": 0.0}, "typical-p"),
        ({"repetition_penalty": 0.0}, "repetition-penalty must be above 0, is 0.0; 1 changes nothing"),
        ({"repetition_penalty": float("inf")}, "repetition-penalty"),
        ({"frequency_penalty": 2.1}, "frequency-penalty must be from -2 to 2"),
        ({"presence_penalty": float("nan")}, "presence-penalty"),
        ({"no_repeat_ngram": -1}, "no-repeat-ngram"),
        ({"min_new_tokens": True}, "min-new-tokens"),
        ({"logit_bias": ((5, 101.0),)}, "logit-bias .* is 5 and 101"),
        ({"logit_bias": ((-1, 1.0),)}, "logit-bias"),
    ],
)
def test_values_out_of_range_are_named(values: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Sampling(**values)


def test_ids_beyond_the_tokenizer_are_refused() -> None:
    Sampling(logit_bias=((49, 1.0),)).check_ids(50)
    with pytest.raises(UsageError, match="token id 50, the tokenizer has ids below 50"):
        Sampling(logit_bias=((3, 1.0), (50, 1.0))).check_ids(50)


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.1},
        {"frequency_penalty": -0.1},
        {"presence_penalty": 0.1},
        {"no_repeat_ngram": 2},
        {"min_new_tokens": 1},
        {"logit_bias": ((1, 1.0),)},
    ],
)
def test_every_adjustment_is_known_as_one(values: dict) -> None:
    assert Sampling(**values).adjusts
    assert not DEFAULT.adjusts
    assert Sampling(**values).filters == DEFAULT.filters
