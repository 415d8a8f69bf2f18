"""`--filter`: the answers of a plain evaluation, SQL's nulls, and messages that name the place and the column."""

import operator
import pickle
from collections.abc import Callable
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightlm.data.select.filters import Filter, matching_rows
from lightlm.errors import DataError, UsageError

ODD = {"class": 0, "meta.in": 0, "日本": {"語": None}}
ROWS: list[dict[str, Any]] = [
    {"score": 4, "language": "en", "rate": 0.5, "ok": True, "meta": {"score": 1}, "a b": 1} | ODD,
    {"score": 3, "language": "de", "rate": None, "ok": False, "meta": {"score": 5}, "a b": 2} | ODD,
    {"score": None, "language": "it's", "rate": -1.5, "ok": None, "meta": None, "a b": 3} | ODD,
    {"score": 2, "language": None, "rate": 3.0, "ok": True, "meta": {"score": None}, "a b": 4} | ODD,
]
TABLE = pyarrow.Table.from_pylist(ROWS)


def kept(text: str) -> list[int]:
    """The rows that stay, from an Arrow table and from mappings, which must agree."""
    row_filter = Filter(text)
    expression = row_filter.arrow(TABLE.schema, "here")
    rows = matching_rows(TABLE, expression).tolist()
    columns = TABLE.select(row_filter.arrow_columns(TABLE.schema))
    assert matching_rows(columns, expression).tolist() == rows
    assert [number for number, row in enumerate(ROWS) if row_filter.keeps(row, lambda: "here")] == rows
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
        ("score IS NOT NULL And language Not In ('en', 'x')", [1]),
        ("language == 'and' or language == '`it`' or ok == False", [1]),
        ("class == 1 or meta.in == 2", []),  # words that Python keeps for itself
        ("日本.語 is null", [0, 1, 2, 3]),
        ("language != 'naïve' and\n score == 4", [0]),
    ],
)
def test_what_stays(text: str, rows: list[int]) -> None:
    assert kept(text) == rows


# The plain evaluation: an expression is its text and a function of a row that returns True, False or None.
Judge = Callable[[dict[str, Any]], bool | None]
Expression = tuple[str, Judge]
OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def column(row: dict[str, Any], name: str) -> Any:
    return row[name] if name in row else (row["meta"] or {}).get("score")


def comparison(name: str, symbol: str, literal: Any) -> Expression:
    def judge(row: dict[str, Any]) -> bool | None:
        value = column(row, name)
        return None if value is None else OPERATORS[symbol](value, literal)

    return f"{name} {symbol} {literal!r}", judge


def membership(name: str, word: str, literals: list[Any]) -> Expression:
    def judge(row: dict[str, Any]) -> bool | None:
        value = column(row, name)
        return None if value is None else (value in literals) == (word == "in")

    return f"{name} {word} {literals!r}", judge


def null(name: str, word: str) -> Expression:
    return f"{name} {word} null", lambda row: (column(row, name) is None) == (word == "is")


def negation(inner: Expression) -> Expression:
    def judge(row: dict[str, Any]) -> bool | None:
        found = inner[1](row)
        return None if found is None else not found

    return f"not ({inner[0]})", judge


def junction(word: str, left: Expression, right: Expression) -> Expression:
    decisive = word == "or"

    def judge(row: dict[str, Any]) -> bool | None:
        found = [left[1](row), right[1](row)]
        return decisive if decisive in found else None if None in found else not decisive

    return f"({left[0]}) {word} ({right[0]})", judge


symbols = st.sampled_from(sorted(OPERATORS))
numbers = st.integers(-1, 5) | st.floats(-2, 4, allow_nan=False)
strings = st.sampled_from(["en", "de", "it's", "zz", "naïve"])
expressions = st.recursive(
    st.one_of(
        st.builds(comparison, st.sampled_from(["score", "rate", "meta.score"]), symbols, numbers),
        st.builds(comparison, st.just("language"), symbols, strings),
        st.builds(comparison, st.just("ok"), st.sampled_from(["==", "!="]), st.booleans()),
        st.builds(membership, st.just("language"), st.sampled_from(["in", "not in"]), st.lists(strings, min_size=1)),
        st.builds(membership, st.just("score"), st.sampled_from(["in", "not in"]), st.lists(numbers, min_size=1)),
        st.builds(null, st.sampled_from(["score", "ok", "meta.score", "meta"]), st.sampled_from(["is", "is not"])),
    ),
    lambda inner: st.builds(negation, inner) | st.builds(junction, st.sampled_from(["and", "or"]), inner, inner),
    max_leaves=6,
)


@given(expression=expressions)
def test_arrow_gives_what_plain_python_gives(expression: Expression) -> None:
    text, judge = expression
    assert kept(text) == [number for number, row in enumerate(ROWS) if judge(row) is True]


@pytest.mark.parametrize(
    ("values", "text", "rows"),
    [
        ([1, 2.5, None, 10**400], "x > 2", [1, 3]),  # integers, floats, and one beyond the numbers of Arrow
        ([2**53 + 1, 2**53], "x == 9007199254740993", [0]),
        ([-(10**400), 3], "x < 0", [0]),
        (["\ud83d", "a"], "x != 'a'", [0]),  # half of a surrogate pair
        ([None, None], "x is null or x == 1", [0, 1]),
    ],
)
def test_values_that_json_can_spell(values: list[Any], text: str, rows: list[int]) -> None:
    row_filter = Filter(text)
    assert [number for number, value in enumerate(values) if row_filter.keeps({"x": value}, lambda: "here")] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid syntax at its end"),
        ("score >", "invalid syntax at its end"),
        (" score is not ", "invalid syntax at its end"),
        (" score >= ] ", "unmatched ']' at: ]"),
        ("score", "a comparison of the column 'score' was expected at: score"),
        ("score = 3", "write == to compare at: = 3"),
        ("(score = 3)", "write == to compare at: score = 3)"),
        ("score >= three", "a number, a quoted text, true or false was expected at: three"),
        ("score == null", "a number, a quoted text, true or false was expected at: null"),
        ("score >= 3 language == 'en'", "at: language"),
        ("(score >= 3", "'(' was never closed at: (score"),
        ("score in []", "a list of values such as ['en', 'de'] was expected at: []"),
        ("score in 3", "a list of values such as ['en', 'de'] was expected at: 3"),
        ("language == 'ü' and score in ['a'", "'[' was never closed at: ['a'"),
        ("score >= 'a", "at: 'a"),
        ("score is 3", "null after 'is' was expected at: 3"),
        ("3 <= score", "a column's name was expected at: 3 <= score"),
        ("1 < score < 3", "a column's name was expected at: 1 <"),
        ("score < 3 < 4", "one comparison of a column with a value was expected at: score"),
        ("score >= 3.x", "at: "),
        ("score >= 99999999999999999999", "was expected at: 9999"),
        ("score >= -99999999999999999999", "was expected at: -9999"),
        ("score >= 1e999", "was expected at: 1e999"),
        ("score >= 3 # of 5", "at: # of 5"),
        ("score == 1 or score == 'a'", "a number, as 'score' is compared with elsewhere, was expected at: 'a'"),
        ("not " * 5000 + "score", "--filter"),
        ("__import__('os').system('ls')", "one comparison of a column with a value was expected at: __import__"),
        ("score + 1 > 2", "a column's name was expected at: score + 1"),
        ("score == f'{ok}'", "at: "),
    ],
)
def test_what_is_not_an_expression(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="--filter") as error:
        Filter(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scor >= 3", "no column 'scor'; there are: score, language, rate, ok, meta, a b, class"),
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
        lambda row_filter: row_filter.arrow(TABLE.schema, "a.parquet"),
        lambda row_filter: [row_filter.keeps(row, lambda: "a.parquet") for row in ROWS],
    ):
        with pytest.raises(DataError, match=r"^a\.parquet: --filter") as error:
            attempt(Filter(text))
        assert message in str(error.value)


def test_a_filter_travels_to_a_worker() -> None:
    row_filter = Filter("meta.score >= 3 and score in [1, 3]")
    assert row_filter.columns == ["meta.score", "score"]
    assert pickle.loads(pickle.dumps(row_filter)) == row_filter
