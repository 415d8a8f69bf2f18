import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightlm.quantities import format_quantity, parse_quantity


@given(st.integers(0, 10**18))
def test_whole_numbers_read_back_exactly(number):
    assert parse_quantity(number) == parse_quantity(str(number)) == parse_quantity(f"{number:_}") == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3M", 3 * 10**6),
        ("1.5B", 1_500_000_000),
        ("512k", 512_000),
        ("2T", 2 * 10**12),
        ("1e9", 10**9),
        (" 10 K ", 10**4),
    ],
)
def test_units(text, value):
    assert parse_quantity(text) == value


def test_binary_units():
    assert parse_quantity("512K", base=1024) == 2**19
    assert parse_quantity("0.5M", base=1024) == 2**19


@given(st.integers(0, 99_999), st.sampled_from([1, 2]), st.sampled_from("KMBT"))
def test_one_and_two_decimals_of_a_unit_are_whole_numbers(number, decimals, unit):
    """In binary floating point, 4.1M, 16.1K and 8.06M are not."""
    scale = 10**decimals
    text = f"{number // scale}.{number % scale:0{decimals}d}{unit}"
    expected = number * 1000 ** ("KMBT".index(unit) + 1) // scale
    assert parse_quantity(text) == parse_quantity(text.lower()) == expected


@pytest.mark.parametrize("number", [1e9, 1e16, 2.0**53, 10**18])
def test_numbers_that_python_writes_with_an_exponent_are_read(number):
    assert parse_quantity(number) == parse_quantity(str(number)) == number


@pytest.mark.parametrize(
    "text", ["", "K", "3X", "-1", "1.5", "0.0001K", "ten", "1 000", True, "inf", "nan", float("inf"), float("nan")]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="whole number"):
        parse_quantity(text)


@pytest.mark.parametrize("text", ["1e19", "1e999", "1000001T", 10**18 + 1])
def test_numbers_that_no_run_has_are_refused(text):
    with pytest.raises(ValueError, match="too large"):
        parse_quantity(text)


def test_a_binary_unit_is_named_where_the_number_is_not_whole():
    with pytest.raises(ValueError, match=r"16\.1K is not a whole number: K is 1024"):
        parse_quantity("16.1K", base=1024)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (124_439_808, "124M"),
        (8_393_472, "8.39M"),
        (40 * 10**9, "40B"),
        (0, "0"),
        (0.5, "0.5"),
        (999, "999"),
        (999.7, "1K"),
        (999_499, "999K"),
        (999_999, "1M"),
        (999_999_999, "1B"),
        (-999_999, "-1M"),
        (1.2e18, "1,200,000T"),
    ],
)
def test_short_form(number, text):
    assert format_quantity(number) == text


@given(st.integers(0, 10**15))
def test_the_short_form_has_three_digits_and_is_near(number):
    text = format_quantity(number)
    assert re.fullmatch(r"\d{1,3}(\.\d{1,2})?[KMBT]?|1,000T", text)
    digits, unit = re.fullmatch(r"([\d.,]+)([KMBT]?)", text).groups()
    assert float(digits.replace(",", "")) * 1000 ** " KMBT".index(unit or " ") == pytest.approx(number, rel=0.006)
