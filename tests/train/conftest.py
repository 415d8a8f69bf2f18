import pytest

from tests.corpus import TINY_RECIPE, make_data


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with data/tiny and tiny.yaml in it."""
    folder = tmp_path_factory.mktemp("workspace")
    make_data(folder)
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return folder
