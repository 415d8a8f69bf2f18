import pytest

from tests.corpus import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with data/tiny and tiny.yaml in it."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
