from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="needs lightlm[serve]")
pytest.importorskip("uvicorn", reason="needs lightlm[serve]")

from tests.serve.served import Served, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running
