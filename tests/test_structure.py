"""The layout of the package, as docs/architecture.md promises it; `make check` holds the direction of imports."""

from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightlm"


def test_no_folder_has_more_than_14_python_files():
    counts = Counter(path.parent for path in PACKAGE.rglob("*.py"))
    assert {folder: count for folder, count in counts.items() if count > 14} == {}


def test_the_architecture_page_names_every_room():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert {room for room in rooms if f"`{room}" not in page} == set()
