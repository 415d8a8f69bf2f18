"""Prompts typed one after the other: through a pipe, and at a terminal."""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lightlm.cli.generate import interactive
from lightlm.cli.generate.command import PromptCommand, generate
from lightlm.cli.generate.single import answer
from lightlm.generate.engine import generate as continue_ids
from lightlm.generate.prompts import encode_chat
from lightlm.generate.sampling import GREEDY
from lightlm.generate.text import text_of
from tests.cli.generate.conftest import talker

app = typer.Typer()
app.command(cls=PromptCommand)(generate)


def session(entries: str, *arguments: str) -> Any:
    done = CliRunner().invoke(app, ["-i", "--max-new-tokens", "8", *arguments], input=entries.encode())
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.mark.usefixtures("here")
class TestPipe:
    def test_a_conversation_keeps_its_turns_until_it_is_reset(self) -> None:
        loaded, expected = talker(), []
        turns: list[dict[str, str]] = []
        for text in ("the cat", "sat", None, "sat"):
            if text is None:
                turns = []
                continue
            turns.append({"role": "user", "content": text})
            _, ids = encode_chat(loaded.tokenizer, turns)
            ends, size = loaded.tokenizer.end_ids, loaded.tokenizer.vocab_size
            [answer] = continue_ids(loaded.model, [ids], 8, GREEDY, 1337, ends, vocab_size=size)
            expected.append(text_of(loaded.tokenizer, ids, answer.ids))
            turns.append({"role": "assistant", "content": expected[-1]})
        done = session("the cat\nsat\n/reset\nsat\n", "--checkpoint", "talker", "--chat", "--temperature", "0")
        assert done.stdout == "".join(f"{text}\n" for text in expected)
        assert done.stderr.count("tokens/s") == 3

    def test_texts_are_continued_by_themselves_with_settings_that_change(self) -> None:
        alone = CliRunner().invoke(app, ["The cat", "--max-new-tokens", "5", "--temperature", "0"]).stdout
        done = session("A dog\n/max-new-tokens 5\n/temperature 0\nThe cat\n/top-k\n/stop none\n")
        assert done.stdout.split("\n", 1)[1] == alone.removeprefix("The cat")
        assert "max-new-tokens 5" in done.stderr
        assert "top-k none" in done.stderr

    def test_entries_of_several_lines(self) -> None:
        whole = CliRunner().invoke(app, ["a\nb", "--max-new-tokens", "8", "--temperature", "0"]).stdout
        for entry in ("a\\\nb\n", '"""a\nb"""\n', '"""a\r\nb"""', '"""a\nb'):
            assert session(entry, "--temperature", "0").stdout == whole.removeprefix("a\nb")
        whole = CliRunner().invoke(app, ["a\n", "--max-new-tokens", "8", "--temperature", "0"]).stdout
        assert session("a\\\n", "--temperature", "0").stdout == whole.removeprefix("a\n")

    @pytest.mark.parametrize(
        ("typed", "stops"), [("\\n", ["\n"]), ('"\\n"', ["\n"]), ("5", ["5"]), ('["a", "b"]', ["a", "b"])]
    )
    def test_stop_strings_are_typed_as_on_the_command_line_or_as_json(self, typed: str, stops: list[str]) -> None:
        assert f"stop {json.dumps(stops)}" in session(f"/stop {typed}\n").stderr

    def test_a_turn_that_cannot_be_answered_again_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def failing(loaded: Any, questions: Any, *rest: Any) -> Any:
            asked.append(loaded.tokenizer.decode(questions[0].ids))
            if len(asked) == 2:
                raise KeyboardInterrupt
            return answer(loaded, questions, *rest)

        monkeypatch.setattr(interactive, "answer", failing)
        session("the cat\n/again\nsat\n", "--checkpoint", "talker", "--chat")
        assert "the cat" in asked[2]

    def test_guesses_of_a_stopped_answer_are_not_counted_in_the_next_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def guessing(loaded: Any, questions: Any, show: Any, speculation: Any) -> Any:
            asked.append(questions)
            speculation.guessed += 5
            if len(asked) == 1:
                raise KeyboardInterrupt
            return answer(loaded, questions, show)

        monkeypatch.setattr(interactive, "answer", guessing)
        done = session("the cat\nsat\n", "--lookup")
        assert "stopped" in done.stderr
        assert "0 of 5 guesses were right" in done.stderr

    def test_another_seed_answers_again(self) -> None:
        entries = "The cat\n/again\n/seed 1337\nThe cat\n"
        first, again, seeded, _ = session(entries, "--stop", "\\n").stdout.split("\n")
        assert first == seeded != again

    def test_mistakes_are_told_and_the_session_goes_on(self) -> None:
        done = session(
            "/tempreature 5\n/temperature hot\n/system x\n/again\n/help\nThe cat ran " + "The cat " * 60 + "\n//x\n"
        )
        assert "no command /tempreature; do you mean /temperature?" in done.stderr
        assert "temperature must be a number, is 'hot'" in done.stderr
        assert "start with --chat" in done.stderr
        assert "nothing to answer again" in done.stderr
        assert "context holds 40" in done.stderr
        assert "/repetition-penalty" in done.stderr
        assert done.stderr.count("tokens/s") == 1
        session("/exit\n/never read\n")

    def test_a_template_that_is_not_used_is_named(self) -> None:
        assert "--chat" in session("", "--checkpoint", "talker").stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(world: Path, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {
        "TERM": "dumb",
        "XDG_STATE_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    # The end-of-text token has id 0; without it the answer goes on.
    options = ["-i", "--max-new-tokens", "1000000", "--sliding-window", "--logit-bias", "0=-100"]
    command = [sys.executable, "-m", "lightlm", "generate", *options]
    with subprocess.Popen(command, cwd=world, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            wait_for(ours, "> ")
            os.write(ours, b"The cat\r")
            wait_for(ours, "\n", characters=200)
            process.send_signal(signal.SIGINT)
            assert "stopped" in wait_for(ours, "> ")
            os.write(ours, b"/temperature 0.25\r")
            assert "temperature 0.25" in wait_for(ours, "> ")
            os.write(ours, b"\x04")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(ours)
    if importlib.util.find_spec("readline"):
        history = tmp_path / "lightlm" / "history"
        assert "The cat" in history.read_text()
        assert history.stat().st_mode & 0o077 == 0


def wait_for(terminal: int, end: str, characters: int = 0) -> str:
    """Return what the terminal shows until it ends so, and is so long."""
    shown, deadline = "", time.monotonic() + 120
    while not (end in shown if characters else shown.endswith(end)) or len(shown) < characters:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, f"waited for {end!r} after {shown!r}"
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown
