from typing import Any, Optional

import pytest

from lightlm.errors import UsageError
from lightlm.generate import settings
from lightlm.generate.sampling import Sampling
from lightlm.generate.settings import Settings, changeable


def test_settings_change_by_their_names_in_json() -> None:
    values = {
        "temperature": 1,
        "top_k": None,
        "stop": "\n",
        "seed": 7,
        "logit_bias": {"5": -100},
        "sliding_window": True,
    }
    expected = Settings(Sampling(1.0, None, logit_bias=((5, -100.0),)), seed=7, stop=("\n",), sliding_window=True)
    assert Settings(Sampling(0.5, 40)).changed(values) == expected
    assert Settings().changed({"stop": ["a", "b"]}).stop == ("a", "b")
    assert Settings().changed({}) == Settings()
    nulls = dict.fromkeys(changeable())  # as pandas writes what a row lacks
    assert Settings(Sampling(0.5, 40), 9, 3, ("a",)).changed(nulls) == Settings(Sampling(0.5, None), 9, 3, ("a",))
    assert {"temperature", "min_p", "max_new_tokens", "stop"} <= changeable().keys()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temprature": 1}, "no setting temprature; do you mean temperature"),
        ({"temperature": "hot"}, "temperature must be a number, is 'hot'"),
        ({"temperature": True}, "temperature must be a number"),
        ({"top_k": 1.5}, "top-k must be a whole number"),
        ({"top_p": 2}, "top-p must be above 0"),
        ({"max_new_tokens": 0}, "max-new-tokens must be a whole number, at least 1"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min-new-tokens is 3, above max-new-tokens, which is 2"),
        ({"stop": 5}, "stop must be a text or a list of texts"),
        ({"stop": ""}, "stop string is empty"),
        ({"logit_bias": {"a": 1}}, "'a' is not an id"),
        ({"logit_bias": [1]}, "logit-bias must be an object"),
        ({"sliding_window": 1}, "sliding-window must be true or false"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Settings().changed(values)


def test_a_wrong_value_is_named_where_a_union_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `int | None` has from Python 3.14, and `Optional` had before."""
    monkeypatch.setattr(settings, "changeable", lambda: {"top_k": Optional[int]})  # noqa: UP045
    with pytest.raises(UsageError, match="top-k must be a whole number"):
        Settings().changed({"top_k": 1.5})
