"""`--filter`: the same answer in Arrow and in Python, SQL's nulls, and messages that name columns."""

import pickle
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightlm.data.select.filters import Filter
from lightlm.errors import DataError, UsageError

ROWS: list[dict[str, Any]] = [
    {"score": 4, "language": "en", "rate": 0.5, "ok": True, "meta": {"score": 1}, "a b": 1},
    {"score": 3, "language": "de", "rate": None, "ok": False, "meta": {"score": 5}, "a b": 2},
    {"score": None, "language": "it's", "rate": -1.5, "ok": None, "meta": None, "a b": 3},
    {"score": 2, "language": None, "rate": 3.0, "ok": True, "meta": {"score": None}, "a b": 4},
]
TABLE = pyarrow.Table.from_pylist(ROWS)


def kept(text: str) -> list[int]:
    """The rows that stay, which both ways must agree on."""
    chosen = Filter(text)
    rows = [number for number, row in enumerate(ROWS) if chosen.keeps(row, lambda: "here")]
    numbered = TABLE.append_column("number", pyarrow.array(range(len(ROWS))))
    expression = chosen.arrow(TABLE.schema, "here")
    assert numbered.filter(expression)["number"].to_pylist() == rows
    columns = [*chosen.arrow_columns(TABLE.schema), "number"]
    assert numbered.select(columns).filter(expression)["number"].to_pylist() == rows
    return rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("score >= 3", [0, 1]),
        ("score>=3 AND language != 'en'", [1]),
        ("not score >= 3", [3]),  # null is neither
        ("score == 4 or score == 2 and ok == false", [0]),  # `and` binds more tightly
        ("(score == 4 or score == 2) and ok == true", [0, 3]),
        ("language in ['en', \"it's\"]", [0, 2]),
        ("language not in ['en']", [1, 2]),
        (r"language == 'it\'s'", [2]),
        ("score is null or rate is null", [1, 2]),
        ("score is not null", [0, 1, 3]),
        ("rate < -1e0", [2]),
        ("score > 2.5", [0, 1]),
        ("rate == 3", [3]),
        ("meta.score >= 1", [0, 1]),
        ("meta.score is null", [2, 3]),
        ("`a b` in [2, 4.0]", [1, 3]),
        ("score == 9 or score is null and not (ok == true)", []),
    ],
)
def test_what_stays(text: str, rows: list[int]) -> None:
    assert kept(text) == rows


comparisons = st.one_of(
    st.builds("score {} {}".format, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), st.integers(-1, 5)),
    st.builds("rate {} {}".format, st.sampled_from(["<", ">="]), st.floats(-2, 4, allow_nan=False)),
    st.builds("language {} ['en', 'de']".format, st.sampled_from(["in", "not in"])),
    st.sampled_from(["ok == true", "ok is null", "meta.score in [1]", "meta.score is not null"]),
)
expressions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.builds("not {}".format, inner),
        st.builds("({})".format, inner),
        st.builds("{} {} {}".format, inner, st.sampled_from(["and", "or"]), inner),
    ),
    max_leaves=6,
)


@settings(deadline=None)  # other processes may be at work
@given(text=expressions)
def test_arrow_and_python_agree(text: str) -> None:
    kept(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a column's name was expected at its end"),
        ("score", "'in' or 'is' after the column 'score' was expected at its end"),
        ("score = 3", "was expected at: = 3"),
        ("score >= three", "a number, a quoted text, true or false was expected at: three"),
        ("score >= 3 language == 'en'", "'and', 'or' or the end was expected at: language"),
        ("(score >= 3", "')' was expected at its end"),
        ("score in []", "was expected at: ]"),
        ("score in ['a'", "']' was expected at its end"),
        ("score >= 'a", "was expected at: 'a"),
        ("3 <= score", "a column's name was expected at: 3 <= score"),
        ("score >= 3.x", "was expected at: 3.x"),
        ("score >= 99999999999999999999", "was expected at: 9999"),
        ("__import__('os').system('ls')", "was expected at"),
    ],
)
def test_what_is_no_expression(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="--filter") as error:
        Filter(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scor >= 3", "no column 'scor'; there are: score, language, rate, ok, meta, a b"),
        ("meta.points >= 3", "no column 'meta.points'"),
        ("language.x == 'a'", "no column 'language.x'"),
        ("language >= 3", "the column 'language' holds"),
        ("ok == 1", "the column 'ok' holds"),
        ("score == 'a'", "the column 'score' holds"),
        ("meta == 'a'", "the column 'meta' holds"),
        ("score >= 3 or scor is null", "no column 'scor'"),
    ],
)
def test_what_does_not_fit_the_columns(text: str, message: str) -> None:
    for attempt in (
        lambda chosen: chosen.arrow(TABLE.schema, "a.parquet"),
        lambda chosen: [chosen.keeps(row, lambda: "a.parquet") for row in ROWS],
    ):
        with pytest.raises(DataError, match=r"^a\.parquet: --filter") as error:
            attempt(Filter(text))
        assert message in str(error.value)


def test_a_filter_travels_to_a_worker() -> None:
    chosen = Filter("meta.score >= 3 and score in [1, 3]")
    assert chosen.columns == ["meta.score", "score"]
    assert pickle.loads(pickle.dumps(chosen)) == chosen
