"""`lightlm prepare-data` with standard input, mixtures, filters, de-duplication and decontamination."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lightlm.cli.prepare_data.command import prepare_data
from lightlm.data.folder import DataFolder
from lightlm.errors import DataError, LightLMError, UsageError
from lightlm.evaluate.tasks import manager
from tests.corpus import texts
from tests.evaluate.tiny_run import write_quiz

ROWS = [{"text": text, "score": n % 5} for n, text in enumerate(texts(60))]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60, 8)), encoding="utf-8")


def run(*arguments: str, stdin: str | None = None) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(prepare_data)
    result = CliRunner().invoke(app, ["--tokenizer", "train:300", "--json", *arguments], input=stdin)
    if isinstance(result.exception, LightLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def documents(folder: str) -> list[str]:
    opened = DataFolder.open(folder)
    return [
        opened.tokenizer.decode(ids)
        for split in ("train", "val")
        if opened.manifest.tokens(split)
        for ids in opened.split(split).documents()
    ]


def test_json_lines_and_text_come_through_a_pipe() -> None:
    lines = Path("a.jsonl").read_text(encoding="utf-8")
    made = run("-", stdin=lines)
    assert (made["folder"], made["documents"], made["status"]) == ("data/stdin", 60, "prepared")
    assert sorted(documents("data/stdin")) == sorted(row["text"] for row in ROWS)
    assert run("-", stdin=lines)["status"] == "already prepared"
    assert run("-", "--verify")["status"] == "verified"
    with pytest.raises(DataError, match="content: xxh3"):
        run("-", stdin=lines + lines)
    text = "A story.\n\nIt has {two} paragraphs.\n" * 40
    run("-", "--out", "data/story", "--val-fraction", "0", stdin=text)
    assert documents("data/story") == [text]
    assert sorted(path.name for path in Path("data").iterdir()) == ["stdin", "story"]
    with pytest.raises(DataError, match="plain text"):
        run("-", "--filter", "score > 1", "--out", "data/other", stdin=text)


def test_a_filter_and_repetitions() -> None:
    Path("twice.jsonl").write_text(Path("a.jsonl").read_text() * 2)
    made = run("twice.jsonl", "--filter", "score >= 3", "--dedup", "exact")
    assert made["documents"] == 24
    assert made["dropped"] == {"duplicate": 24, "filtered": 72}
    assert sorted(documents("data/twice")) == sorted(row["text"] for row in ROWS if row["score"] >= 3)
    with pytest.raises(DataError, match="dedup: xxh3_64 there, None now"):
        run("twice.jsonl", "--filter", "score >= 3")


def test_documents_with_the_text_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_OURS", {"heldout", "quiz.yaml"})
    write_quiz(Path.cwd())
    question = "Was the cat number three the one that sat on the mat after it ran"
    quiz = Path("quiz.jsonl").read_text(encoding="utf-8").replace("The cat number 3 sat", question)
    Path("quiz.jsonl").write_text(quiz, encoding="utf-8")
    with Path("a.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": f"Question: {question}?", "score": 0}) + "\n")
    made = run("a.jsonl", "--decontaminate", "quiz.yaml")
    assert made["documents"] == 60
    assert made["dropped"] == {"contaminated: quiz": 1}
    assert made["evaluation_sets"] == {"quiz": {"examples": 6, "too_short": 5}}
    made = run("a.jsonl", "--decontaminate", "quiz.yaml", "--contaminated", "flag", "--out", "data/flagged")
    assert (made["documents"], made["dropped"], made["flagged"]) == (61, {}, {"contaminated: quiz": 1})
    assert DataFolder.open("data/flagged").manifest.listed == ["a.jsonl#byte=0, document 60: contaminated: quiz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a SOURCE"),
        (["--mix", "a.jsonl=0.7,b.jsonl=0.3"], "write the shares into the recipe: data"),
        (["a.jsonl=0.7,b.jsonl=0.3"], "write the shares into the recipe: data"),
        (["--mix", "a.jsonl=1", "--download-only"], "write the shares into the recipe: data"),
        (["a.jsonl", "--filter", "score >"], "invalid syntax at its end"),
        (["a.jsonl", "--contaminated", "flag"], "--decontaminate"),
        (["a.jsonl", "--decontaminate", "heldout"], "--decontaminate heldout"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(*arguments)
    assert not Path("data").exists()


@pytest.mark.parametrize("option", ["--dedup", "--contaminated", "--encoder"])
def test_only_listed_values_are_taken(option: str) -> None:
    app = typer.Typer()
    app.command()(prepare_data)
    refused = CliRunner().invoke(app, ["a.jsonl", option, "other"])
    assert refused.exit_code == 2
    assert option in refused.output
    assert not Path("data").exists()


def test_a_download_refuses_what_says_how_to_prepare() -> None:
    """Every option but those of the download itself, so that a new one is refused until it is honored."""
    values = {"--max-tokens": "1B", "--val-fraction": "0.1", "--workers": "2", "--sample": "3", "--engine": "ray"}
    values |= {"--encoder": "auto", "--dedup": "near", "--contaminated": "flag"}
    values |= {"--format": "chat", "--train-on": "last", "--top-k": "8", "--teacher-context": "64"}
    app = typer.Typer()
    app.command()(prepare_data)
    options = {option.opts[0]: option for option in typer.main.get_command(app).params if option.opts[0][:2] == "--"}
    honored = {"--tokenizer", "--text-column", "--download-only", "--json"}
    assert honored < options.keys()
    for name in options.keys() - honored - {"--mix", "--install-completion", "--show-completion"}:
        flag = getattr(options[name], "is_flag", False)
        with pytest.raises(UsageError, match=f"prepares nothing, so {name} would have no effect"):
            run("tinystories", "--download-only", name, *([] if flag else [values.get(name, "x")]))
    with pytest.raises(UsageError, match="so --filter, --dedup would have no effect"):
        run("tinystories", "--dedup", "near", "--download-only", "--filter", "score > 1")
    assert not Path("data").exists()
