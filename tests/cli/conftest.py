import pytest

from tests.cli.runner import Runner


@pytest.fixture
def lightlm(monkeypatch, capsys):
    return Runner(monkeypatch, capsys)
