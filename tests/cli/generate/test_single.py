"""One prompt: where it comes from, how it is read, and how its text ends."""

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lightlm.cli.generate import single
from lightlm.cli.generate.command import PromptCommand, generate
from lightlm.errors import LightLMError, UsageError
from lightlm.generate.batch import Batch
from lightlm.generate.engine import generate as continue_ids
from lightlm.generate.prompts import encode_chat, encode_prompt
from lightlm.generate.sampling import GREEDY
from lightlm.generate.text import text_of
from tests.cli.generate.conftest import talker

pytestmark = pytest.mark.usefixtures("here")
app = typer.Typer()
app.command(cls=PromptCommand)(generate)
GREEDILY = ("--temperature", "0", "--max-new-tokens", "12")


def run(*arguments: str, code: int = 0):
    done = CliRunner().invoke(app, [*arguments, *GREEDILY])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def sample(*arguments: str) -> dict:
    [found] = json.loads(run(*arguments, "--json").stdout)["samples"]
    return found


def test_a_prompt_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("Grüße\r\nThe cat\n".encode())
    assert run("--prompt-file", str(tmp_path / "prompt.txt")).stdout.startswith("Grüße\nThe cat")
    missing = CliRunner().invoke(app, ["--prompt-file", "nowhere.txt"])
    assert "nowhere.txt cannot be read" in str(missing.exception)


def test_a_sentencepiece_text_keeps_the_space_after_the_prompt() -> None:
    """Shown, in JSON, and in each of several samples."""
    loaded = talker()
    prompt = encode_prompt(loaded.tokenizer, "one two")
    ends, size = loaded.tokenizer.end_ids, loaded.tokenizer.vocab_size
    [greedy] = continue_ids(loaded.model, [prompt], 12, GREEDY, 1337, ends, vocab_size=size)
    expected = loaded.tokenizer.decode(prompt + greedy.ids)
    assert expected.startswith("one two")
    arguments = ("one two", "--checkpoint", "talker")
    assert run(*arguments).stdout == f"{expected}\n"
    assert sample(*arguments)["text"] == expected.removeprefix("one two")
    assert run(*arguments, "--num-samples", "2").stdout == f"{expected}\n\n---\n{expected}\n"


def test_special_tokens_of_a_prompt_are_text_with_a_note_or_are_read() -> None:
    noted = run("<|endoftext|>The cat")
    assert "spells <|endoftext|>, read as plain text; --parse-special" in noted.stderr
    document = json.loads(run("<|endoftext|>The cat", "--parse-special", "--json").stdout)
    plain = json.loads(run("The cat", "--json").stdout)
    assert document["prompt_tokens"] == plain["prompt_tokens"] + 1
    assert document["samples"] != plain["samples"]


def test_a_stop_string_ends_the_text() -> None:
    whole = sample("The cat")
    stop = whole["text"][3:5]
    before = whole["text"][: whole["text"].index(stop)]
    stopped = sample("The cat", "--stop", "never there", "--stop", stop)
    assert (stopped["text"], stopped["finish_reason"], stopped["stop"]) == (before, "stop", stop)
    assert run("The cat", "--stop", stop).stdout == f"The cat{before}\n"
    assert run("The cat", "--stop", "- x").stdout == f"The cat{whole['text']}\n"  # not a prompt


def test_a_prompt_past_the_context_is_refused_or_truncated() -> None:
    long = "The cat ran " * 40
    refused = CliRunner().invoke(app, [long])
    assert isinstance(refused.exception, LightLMError)
    assert "context holds 40" in str(refused.exception)
    assert "--truncate left" in str(refused.exception)
    done = run(long, "--truncate", "left", "--json")
    assert json.loads(done.stdout)["prompt_tokens"] == 28
    assert "left out" in done.stderr


def test_a_full_context_ends_or_slides() -> None:
    arguments = ("The cat", "--max-new-tokens", "60", "--temperature", "0", "--json")
    ended = CliRunner().invoke(app, arguments)
    assert json.loads(ended.stdout)["samples"][0]["finish_reason"] == "context"
    assert "--sliding-window" in ended.stderr
    slid = json.loads(CliRunner().invoke(app, [*arguments, "--sliding-window"]).stdout)["samples"][0]
    assert (len(slid["ids"]), slid["finish_reason"]) == (60, "length")


@pytest.mark.parametrize("system", [None, "be kind"])
def test_a_message_is_written_with_the_chat_template(system: str | None) -> None:
    loaded = talker()
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": "the cat"})
    _, ids = encode_chat(loaded.tokenizer, messages)
    ends, size = loaded.tokenizer.end_ids, loaded.tokenizer.vocab_size
    [expected] = continue_ids(loaded.model, [ids], 12, GREEDY, 1337, ends, vocab_size=size)
    arguments = ["the cat", "--checkpoint", "talker", "--chat", *(() if system is None else ("--system", system))]
    assert run(*arguments).stdout == text_of(loaded.tokenizer, ids, expected.ids) + "\n"
    document = json.loads(run(*arguments, "--json").stdout)
    assert (document["messages"], document["samples"][0]["ids"]) == (messages, expected.ids)


def test_suggestions_of_the_models_files_are_named() -> None:
    arguments = ["one", "--checkpoint", "talker", "--max-new-tokens", "2", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert "suggest temperature 0.6, top_k 20" in done.stderr
    assert json.loads(done.stdout)["suggested_by_model"] == {"temperature": 0.6, "top_k": 20}
    assert "suggest" not in CliRunner().invoke(app, [*arguments, "--temperature", "1"]).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no prompt"),
        (["x", "--prompt-file", "y"], "a prompt and --prompt-file exclude each other"),
        (["--jsonl", "x"], "--out"),
        (["x", "--out", "y"], "--jsonl"),
        (["--jsonl", "x", "--out", "."], "is not a file"),
        (["--jsonl", "x", "--out", os.devnull], "is not a file"),
        (["x", "--batch-size", "8"], "add --jsonl"),
        (["x", "--guesses", "8"], "add one of them"),
        (["x", "--stop", "a\udcff"], "--stop is not valid UTF-8 at character 2"),
        (["x", "--chat", "--system", "\udcff"], "--system is not valid UTF-8"),
        (["--jsonl", "x", "--out", "nowhere/y"], "there is no folder nowhere"),
        (["x", "--truncate", "right"], "write left"),
        (["x", "--system", "y"], "--chat"),
        (["x", "--chat"], "no chat template"),
        (["x", "--stop", ""], "stop string is empty"),
        (["-i", "--num-samples", "2"], "one answer at a time"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)
    assert done.stdout == ""


def test_a_text_that_nobody_reads_anymore_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind `| head`: quietly, and without computing the rest."""
    steps: list[int] = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: steps.append(1) or step(batch))
    monkeypatch.setattr(single, "reader_left", lambda: len(steps) == 3)
    done = run("The cat", "--min-new-tokens", "12")
    assert len(steps) == 3
    assert "tokens/s" not in done.output
