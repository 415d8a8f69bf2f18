"""Runs the real command line in this process, as the shell would."""

import sys
from dataclasses import dataclass

import pytest

from lightlm.cli.app import main


@dataclass
class Outcome:
    code: int
    stdout: str
    stderr: str

    def assert_one_message(self, *parts: str) -> None:
        """A mistake's answer: one message on standard error, nothing else, and a non-zero exit."""
        assert self.code in (1, 2), self
        assert self.stdout == "", self
        assert self.stderr.count("Error:") == 1, self
        assert "Traceback" not in self.stderr, self
        flat = " ".join(self.stderr.split())
        for part in parts:
            assert part in flat, (part, flat)


class Runner:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["lightlm", *arguments])
        self._capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 0
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)
