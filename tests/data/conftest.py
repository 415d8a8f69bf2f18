from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.hub_data import DOCUMENTS, make_fineweb_edu, use


@pytest.fixture(scope="session")
def fineweb_edu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fineweb_edu(tmp_path_factory.mktemp("fineweb-edu"), DOCUMENTS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub to which the libraries of this process are pointed, with an empty cache."""
    with Hub() as server:
        use(server, tmp_path / "cache", monkeypatch)
        yield server
