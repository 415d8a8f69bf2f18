"""A file of prompts: answers as each prompt gets alone, resumed after any cut, and mistakes by line."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lightlm.checkpoint import save_model
from lightlm.cli.generate import jsonl
from lightlm.cli.generate.command import PromptCommand, generate
from lightlm.errors import DataError, UsageError
from tests.evaluate.tiny_run import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("here")
app = typer.Typer()
app.command(cls=PromptCommand)(generate)
ROWS = [
    {"prompt": "The cat", "id": "first"},
    {"prompt": "A dog ran after the cat; the cat ran", "temperature": 0, "max_new_tokens": 4},
    {"prompt": "", "seed": 5},
    {"prompt": "The cat", "stop": ["a", "e"], "top_k": 40},
    {"prompt": "naïve 🙂", "id": 7},
]


def write(path: Path, rows: list[Any], ending: str = "\n") -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + ending for row in rows), encoding="utf-8")
    return path


def run(source: Path, out: Path, *arguments: str) -> Any:
    arguments = ("--max-new-tokens", "9", *arguments)
    return CliRunner().invoke(app, ["--jsonl", str(source), "--out", str(out), *arguments])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_line_gets_what_it_gets_alone_in_the_order_of_the_input(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    done = run(source, tmp_path / "out.jsonl", "--batch-size", "2")
    assert done.exit_code == 0, done.exception
    assert "tokens/s" in done.stderr
    answers = read(tmp_path / "out.jsonl")
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4, 5]
    assert [answer.get("id") for answer in answers] == ["first", None, None, None, 7]
    for row, answer in zip(ROWS, answers, strict=True):
        options = ["--seed", str(answer["seed"]), "--max-new-tokens", str(row.get("max_new_tokens", 9))]
        options += ["--temperature", str(row["temperature"])] if "temperature" in row else []
        options += ["--top-k", str(row["top_k"])] if "top_k" in row else []
        for stop in row.get("stop", []):
            options += ["--stop", stop]
        alone = json.loads(CliRunner().invoke(app, [row["prompt"], *options, "--json"]).stdout)["samples"][0]
        assert {key: answer[key] for key in ("text", "finish_reason", "stop")} == {
            key: alone[key] for key in ("text", "finish_reason", "stop")
        }
        assert answer["tokens"] == len(alone["ids"])
    assert answers[0]["seed"] != answers[3]["seed"]
    assert answers[2]["seed"] == 5


@given(st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cut_at_any_byte_is_resumed_without_a_torn_or_repeated_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    source, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    run(source, out, "--num-samples", "2")
    whole = out.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    out.write_bytes(whole[:cut])
    answered: list[int] = []
    answers = jsonl._answers

    def counted(loaded: Any, todo: Any, *rest: Any) -> Any:
        answered.append(len(todo))
        return answers(loaded, todo, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "_answers", counted)
        assert run(source, out, "--num-samples", "2").exit_code == 0
    assert out.read_bytes() == whole
    assert answered == [10 - whole[:cut].count(b"\n")]


def test_an_interruption_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    run(source, out)
    whole = out.read_bytes()
    out.unlink()
    answers = jsonl._answers

    def stopped(*arguments: Any) -> Any:
        for number, each in enumerate(answers(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "_answers", stopped)
        done = run(source, out)
    assert done.exit_code == 130
    assert "Rerun the same command to resume" in done.stderr
    assert len(read(out)) == 4  # the fourth was finished, too
    assert run(source, out).exit_code == 0
    assert out.read_bytes() == whole
    assert "All 5 answers are in" in run(source, out).stderr


def test_the_same_command_twice_at_a_time_leaves_each_answer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    run(source, out)
    whole = out.read_bytes()
    out.unlink()
    answers = jsonl._answers

    def beside_another(*arguments: Any) -> Any:
        out.write_bytes(whole)  # after this command has looked
        return answers(*arguments)

    monkeypatch.setattr(jsonl, "_answers", beside_another)
    assert run(source, out).exit_code == 0
    assert out.read_bytes() == whole


def test_answers_to_something_else_are_not_touched(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    run(source, out)
    kept = out.read_bytes()
    others = (("--temperature", "0.5"), ("--checkpoint", "talker"), ("--stop", "x"))
    for changed in (*others, ("--dtype", "bfloat16"), ("--quantize", "int8")):
        done = run(source, out, *changed)
        assert isinstance(done.exception, DataError)
        assert "out.jsonl:1 answers another prompt" in str(done.exception)
    same = run(source, source)
    assert isinstance(same.exception, UsageError)
    assert "in.jsonl is the file of prompts" in str(same.exception)
    assert read(source) == ROWS[:1]
    for foreign in ("my notes\n", '{"line": [1], "sample": 0, "key": "x"}\n'):
        out.write_text(foreign)
        assert "out.jsonl:1 is not an answer" in str(run(source, out).exception)
        assert out.read_text() == foreign
    out.write_bytes(kept)
    write(source, ROWS[:2])  # more lines are only added
    assert run(source, out).exit_code == 0
    assert out.read_bytes().startswith(kept)


def test_another_model_of_the_same_name_is_told_by_its_weights(tmp_path: Path) -> None:
    source, out, tokenizer = write(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "out.jsonl", tiny_tokenizer()
    for seed, place in enumerate("ab"):
        save_model(tmp_path / place / "hf", tiny_model(tokenizer, seed), tokenizer)
    assert run(source, out, "--checkpoint", str(tmp_path / "a" / "hf")).exit_code == 0
    done = run(source, out, "--checkpoint", str(tmp_path / "b" / "hf"))
    assert isinstance(done.exception, DataError)
    assert "out.jsonl:1 answers another prompt, or with another model" in str(done.exception)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert "All 1 answers are in" in run(source, out, "--checkpoint", str(tmp_path / "moved" / "hf")).stderr


@pytest.mark.parametrize("content", ['{"acc": 0.5}', "my notes", '{"line": 1, "text": "mine"}', '{"line": 10'])
@pytest.mark.parametrize("before", [False, True])
def test_a_file_of_others_without_a_line_end_is_not_taken_for_a_torn_answer(
    tmp_path: Path, content: str, before: bool
) -> None:
    source, out = write(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "scores.json"
    if before:
        run(source, out)
    with out.open("a", encoding="utf-8") as file:
        file.write(content)
    kept = out.read_bytes()
    done = run(source, out)
    assert isinstance(done.exception, DataError)
    assert f"scores.json:{1 + before} is not an answer of this command" in str(done.exception)
    assert out.read_bytes() == kept


def test_conversations_and_prompts_as_messages(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "the cat"}]
    source = write(tmp_path / "in.jsonl", [{"messages": talk, "seed": 1}, {"prompt": "the cat", "seed": 1}])
    arguments = ("--checkpoint", "talker", "--temperature", "0")
    assert run(source, tmp_path / "texts.jsonl", *arguments).exit_code == 0
    assert run(source, tmp_path / "chats.jsonl", *arguments, "--chat").exit_code == 0
    message, text = read(tmp_path / "texts.jsonl")
    same, chat = read(tmp_path / "chats.jsonl")
    assert same["text"] == message["text"] == chat["text"]
    assert text["prompt_tokens"] < message["prompt_tokens"] == chat["prompt_tokens"]
    assert run(source, tmp_path / "system.jsonl", *arguments, "--chat", "--system", "be kind").exit_code == 0
    assert read(tmp_path / "system.jsonl")[0]["prompt_tokens"] > same["prompt_tokens"]
    refused = run(source, tmp_path / "none.jsonl", *arguments, "--system", "be kind")
    assert "in.jsonl:2: --system is the first message of a conversation; add --chat" in str(refused.exception)
    write(source, [{"messages": talk}])
    assert run(source, tmp_path / "talks.jsonl", *arguments, "--system", "be kind").exit_code == 0
    refused = run(source, tmp_path / "none.jsonl")
    assert "in.jsonl:1: the model has no chat template" in str(refused.exception)
    assert not (tmp_path / "none.jsonl").exists()


def test_mistakes_are_listed_by_line_before_anything_is_answered(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "x"}',
        "{prompt",
        "[]",
        '{"prompt": 5}',
        "{}",
        '{"prompt": "x", "temprature": 1}',
        '{"prompt":"x"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    done = run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert isinstance(done.exception, DataError)
    message = str(done.exception)
    for number in (2, 3, 4, 5, 6):
        assert f"in.jsonl:{number}: " in message
    assert "do you mean temperature?" in message
    assert "and 1 more" in message
    assert not (tmp_path / "out.jsonl").exists()
    halves = [{"prompt": "\ud800"}, {"prompt": "x", "id": "\udfff"}, {"prompt": "x", "stop": ["\ud83d"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in halves))
    message = str(run(tmp_path / "in.jsonl", tmp_path / "out.jsonl").exception)
    for number, half in enumerate(("d800", "dfff", "d83d"), 1):
        assert f"in.jsonl:{number}: \\u{half} is half of a character" in message
    (tmp_path / "in.jsonl").write_text("[" * 100_000 + "\n")
    assert "in.jsonl:1: not JSON: maximum recursion" in str(
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl").exception
    )
    write(tmp_path / "in.jsonl", [{"prompt": "x"}, {"prompt": "The cat ran " * 40}])
    assert "in.jsonl:2: the prompt has" in str(run(tmp_path / "in.jsonl", tmp_path / "out.jsonl").exception)
    write(tmp_path / "in.jsonl", [], "")
    assert "has no lines" in str(run(tmp_path / "in.jsonl", tmp_path / "out.jsonl").exception)
    assert "cannot be read" in str(run(tmp_path / "nothing.jsonl", tmp_path / "out.jsonl").exception)
