"""Lists, ranges and times on the command line."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightlm.errors import UsageError
from lightlm.sweep.values import Range, read_duration, read_range, read_settings, split_values

plain = st.text("abcXYZ0123456789.-_%/", min_size=1)
# Also commas, brackets, quotes, backslashes. YAML's keys have at most 1,024 characters, and JSON escapes one as twelve.
texts = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=80)
trees = st.recursive(
    st.integers() | texts | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
flow = trees.map(lambda tree: json.dumps(tree, ensure_ascii=False))  # JSON is YAML
single_quoted = texts.map(lambda text: "'" + text.replace("'", "''") + "'")


@given(st.lists(plain | flow | single_quoted, min_size=1, max_size=5))
def test_commas_inside_brackets_and_quotes_separate_nothing(values):
    assert split_values(",".join(values)) == [value.strip() for value in values]
    assert split_values(" , ".join(values)) == [value.strip() for value in values]


@given(st.lists(trees, min_size=2, max_size=4))
def test_the_parts_are_what_yaml_reads_in_a_list(trees):
    text = ", ".join(json.dumps(tree) for tree in trees)
    assert [yaml.safe_load(part) for part in split_values(text)] == yaml.safe_load(f"[{text}]")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("{a: 1, b: 2},{a: 2, b: 1}", ["{a: 1, b: 2}", "{a: 2, b: 1}"]),
        ("it's,that's", ["it's", "that's"]),
        ('["a, b", "it\'s"],[]', ['["a, b", "it\'s"]', "[]"]),
        ("", [""]),
        ("true,null,20%", ["true", "null", "20%"]),
    ],
)
def test_examples(text, parts):
    assert split_values(text) == parts


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optimizer.lr", "is not a setting"),
        ("optimizer.=1", "is not a setting"),
        ("optimizer.lr=1e-3,,1e-2", "is empty"),
        ("optimizer.lr=1e-3,", "is empty"),
        ("optimizer.betas=[0.9,0.95", "a ] is missing at the end"),
        ("optimizer.betas=0.9]", "a ] closes nothing"),
        ("data.mix={a: [1}", "a } closes nothing"),
        ("eval.prompts=['a,b", "a ' is missing at the end"),
    ],
)
def test_mistakes_are_named(argument, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        read_settings([argument])


def test_a_key_given_twice_is_refused():
    with pytest.raises(UsageError, match=r"optimizer\.lr is given twice"):
        read_settings(["optimizer.lr=1e-3", "train.tokens=1M", "optimizer.lr=3e-3"])


def test_ranges():
    assert read_range("1e-4..1e-2") == Range(1e-4, 1e-2, whole=False)
    assert read_range("1e-4..1e-2").logarithmic
    assert read_range("4..12") == Range(4, 12, whole=True)
    assert not read_range("4..12").logarithmic
    assert read_range("-1..1.5") == Range(-1, 1.5, whole=False)
    assert read_range("1e-3") is None
    assert read_range("../data") is None
    with pytest.raises(ValueError, match="write the smaller number first"):
        read_range("2..1")


def test_durations():
    assert [read_duration(text) for text in ("90s", "30min", "30m", "1.5h", "2d")] == [90, 1800, 1800, 5400, 172_800]
    for wrong in ("2", "h", "-1h", "0h", "2 weeks", ""):
        with pytest.raises(ValueError, match="write a time such as"):
            read_duration(wrong)
