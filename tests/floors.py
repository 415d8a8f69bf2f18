"""Print the lowest version of every dependency in pyproject.toml as pip's constraints, for `make test-floors`."""

import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def floors(project: dict[str, Any]) -> list[str]:
    """Return `name==lowest` for each dependency of the project and its extras, sorted by name.

    Raises:
        ValueError: a dependency has no lower bound, or two entries name different ones.
    """
    found: dict[str, str] = {}
    for text in [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]:
        needed = Requirement(text)
        if needed.name == project["name"]:  # lightlm[hf] within another extra
            continue
        lowest = [bound.version for bound in needed.specifier if bound.operator in (">=", "==")]
        if len(lowest) != 1:
            raise ValueError(f"{text!r} needs one lower bound, such as {needed.name}>=1.0")
        marker = f"; {needed.marker}" if needed.marker else ""
        line = f"{needed.name}=={lowest[0]}{marker}"
        if found.setdefault(needed.name, line) != line:
            raise ValueError(f"{needed.name} has two lower bounds: {found[needed.name]} and {line}")
    return sorted(found.values(), key=str.lower)


if __name__ == "__main__":
    print("\n".join(floors(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"])))
