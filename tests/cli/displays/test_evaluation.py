"""The table that `lightlm eval` prints."""

import pytest

from lightlm.cli.displays.evaluation import _broken


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("ctx/step_000030", 14, ["ctx/step_", "000030"]),
        ("ctx/step_000030", 8, ["ctx/", "step_", "000030"]),
        ("demo", 8, ["demo"]),
        ("smollm2-135m", 8, ["smollm2-", "135m"]),
        ("30B tokens", 8, ["30B", "tokens"]),
        ("gpt2", 4, ["gpt2"]),
        ("averylongname", 8, ["averylon", "gname"]),
        ("", 8, []),
    ],
)
def test_names_break_after_their_signs(name, width, lines):
    assert _broken(name, width) == lines
