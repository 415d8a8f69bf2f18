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


@pytest.mark.parametrize("text", ["", "K", "3X", "-1", "1.5", "0.0001K", "ten", "1 000", True])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="whole number"):
        parse_quantity(text)


def test_short_form():
    assert [format_quantity(n) for n in (124_439_808, 8_393_472, 40 * 10**9, 999)] == ["124M", "8.39M", "40B", "999"]
