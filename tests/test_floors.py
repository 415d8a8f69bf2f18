import tomllib

import pytest

from tests.floors import PYPROJECT, floors


def test_every_dependency_has_one_lowest_version():
    found = floors(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"])
    assert "torch==2.11" in found
    assert not any(line.startswith("lightlm") for line in found)


@pytest.mark.parametrize(("added", "message"), [("some-package", "needs one lower bound"), ("numpy>=2", "two lower")])
def test_a_missing_or_second_floor_is_named(added, message):
    project = {"name": "lightlm", "dependencies": ["numpy>=1.26"], "optional-dependencies": {"more": [added]}}
    with pytest.raises(ValueError, match=message):
        floors(project)
