"""`lightlm prepare-data` as a user types it."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lightlm.cli.displays.preparation import progress_text
from lightlm.cli.prepare_data.command import prepare_data
from lightlm.data.folder import DataFolder, resolve_dataset
from lightlm.data.prepare.run import Progress
from lightlm.data.sources import pydocs
from lightlm.errors import DataError, LightLMError, UsageError

DOCUMENTS = tuple(f"Document {n} is about the number {n}, which is followed by {n + 1}." for n in range(50))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs the command in an empty folder that holds corpus.jsonl; the error is raised as the program would see it."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    Path("corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    app = typer.Typer()
    app.command()(prepare_data)

    def invoke(*arguments: str):  # type: ignore[no-untyped-def]
        result = CliRunner().invoke(app, list(arguments))
        if isinstance(result.exception, LightLMError):
            raise result.exception
        return result

    return invoke


def test_json_is_the_only_thing_on_standard_output(run) -> None:  # type: ignore[no-untyped-def]
    result = run("corpus.jsonl", "--tokenizer", "train:300", "--val-fraction", "0.2", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    folder = DataFolder.open("data/corpus")
    assert summary["folder"] == "data/corpus"
    assert summary["documents"] == 50
    assert summary["train_tokens"] == folder.manifest.tokens("train")
    assert summary["next"] == "lightlm train recipes/demo.yaml data.dataset=corpus"
    assert (
        json.loads(run("corpus.jsonl", "--tokenizer", "train:300", "--val-fraction", "0.2", "--json").stdout)["status"]
        == "already prepared"
    )


def test_a_key_in_a_filter_that_no_record_has_is_named_at_the_end(run) -> None:  # type: ignore[no-untyped-def]
    lines = [json.dumps({"text": text, "score": n} | ({"lang": "en"} if n else {})) for n, text in enumerate(DOCUMENTS)]
    Path("corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    warning = "Warning: 50 records lack 'scor', which --filter names, and hardly any has it. Check its name."
    for number, (text, said) in enumerate(
        {"scor is null": 1, "scor is null and score < 9": 1, "lang is null": 0}.items()
    ):
        result = run("corpus.jsonl", "--tokenizer", "train:300", "--filter", text, "--out", f"out{number}")
        assert result.stderr.count(warning) == said
        assert result.stderr.count("lack") == said
    either = ("corpus.jsonl", "--tokenizer", "out0", "--filter", "lang is null or lang == 'en'")
    both = run(*either[:-1], "lang == 'en' and scor is null", "--out", "both")
    assert warning in both.stderr  # the record that is left out for another key lacks this one, too
    Path("corpus.jsonl").write_text("\n".join(lines[1:] + [json.dumps({"text": 3})] * 60), encoding="utf-8")
    told = run(*either, "--skip-bad", "--out", "bad").stderr
    Path("corpus.jsonl").write_text("\n".join(lines[1:] + lines[:1] * 60), encoding="utf-8")
    told += run(*either, "--max-tokens", "50", "--out", "few").stderr
    assert "lack" not in told


def test_the_files_and_rows_that_are_not_read_are_shown(run) -> None:  # type: ignore[no-untyped-def]
    Path("mix").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in (*DOCUMENTS, None)]
    Path("mix/a.jsonl").write_text("".join(lines), encoding="utf-8")
    Path("mix/b.csv").write_text("id,text\n1,some words\n", encoding="utf-8")
    for name in ("c.png", "d.png", "LICENSE"):
        Path("mix", name).touch()
    shown = " ".join(run("mix", "--tokenizer", "train:300").stdout.split())
    assert "documents from 2 files under mix: 1 .csv, 1 .jsonl files left out 2 .png, 1 without suffix" in shown
    assert "left out 1 null" in shown
    summary = json.loads(run("mix", "--tokenizer", "train:300", "--json").stdout)
    assert summary["files_read"] == {".csv": 1, ".jsonl": 1}
    assert summary["files_left_out"] == {".png": 2, "without suffix": 1}
    assert summary["dropped"] == {"null": 1}


def test_the_table_and_the_next_command(run) -> None:  # type: ignore[no-untyped-def]
    result = run("corpus.jsonl", "--tokenizer", "train:300", "--out", "elsewhere/mine")
    assert "50" in result.stdout
    assert "nats per token" in result.stdout
    assert "lightlm train recipes/demo.yaml data.dataset=elsewhere/mine" in result.stderr


def test_pydocs_needs_no_options_and_no_network(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pydocs, "pydocs_documents", lambda: DOCUMENTS)
    result = run("pydocs", "--json")
    assert json.loads(result.stdout)["next"] == "lightlm train recipes/demo.yaml"
    assert DataFolder.open("data/pydocs").manifest.settings["tokenizer"] == "train:8192"
    assert "too short for 8,192 entries" in result.stderr


def test_verify_checks_and_writes_nothing(run) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="lightlm prepare-data corpus"):
        run("corpus.jsonl", "--verify")
    run("corpus.jsonl", "--tokenizer", "train:300")
    assert json.loads(run("corpus.jsonl", "--verify", "--json").stdout)["status"] == "verified"
    shard = Path("data/corpus/train_000000.bin")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"train_000000\.bin: checksum"):
        run("corpus.jsonl", "--verify")


def test_verify_refuses_what_it_would_ignore(run) -> None:  # type: ignore[no-untyped-def]
    run("corpus.jsonl", "--tokenizer", "train:300")
    options = ["--overwrite", "--teacher", "m", "--max-tokens", "9", "--dedup", "exact", "--skip-bad"]
    with pytest.raises(UsageError, match=r"--verify .* so --max-tokens, --overwrite, --skip-bad, --dedup, --teacher"):
        run("corpus.jsonl", "--verify", *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-tokens", "many"), "--max-tokens many"),
        (("--max-tokens", "0"), "--max-tokens 0"),
        (("--tokenizer", "train:abc"), "train:abc"),
        (("--val-fraction", "1.5"), r"--val-fraction 1\.5"),
        (("--workers", "0"), "--workers 0"),
    ],
)
def test_wrong_option_values_are_usage_errors(run, arguments: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        run("corpus.jsonl", *arguments)
    assert not Path("data").exists()


@pytest.mark.parametrize(
    "out", ["books", "data/books", "data/.books", "a/my books [old]", "my books [old]", "data/a [b]"]
)
def test_the_next_command_names_the_folder_that_was_written(run, out: str) -> None:  # type: ignore[no-untyped-def]
    for other in ("books", "data/books", ".books"):
        Path(other).mkdir(parents=True)
    result = run("corpus.jsonl", "--tokenizer", "train:300", "--out", out)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Next: ")]
    command = shlex.split(line.removeprefix("Next: "))
    assert command[:-1] == ["lightlm", "train", "recipes/demo.yaml"]
    assert resolve_dataset(command[-1].removeprefix("data.dataset=")) == Path(out)
    assert f"{out} (prepared)" in result.stdout


@pytest.mark.parametrize("source", ["data/corpus", "corpus"])
def test_verify_takes_the_finished_folder_also_when_the_text_is_gone(run, source: str) -> None:  # type: ignore[no-untyped-def]
    run("corpus.jsonl", "--tokenizer", "train:300")
    Path("corpus.jsonl").unlink()
    assert json.loads(run(source, "--verify", "--json").stdout)["folder"] == "data/corpus"
    assert json.loads(run("corpus.jsonl", "--out", "data/corpus", "--verify", "--json").stdout)["status"] == "verified"


def test_bad_records_are_counted_and_listed(run) -> None:  # type: ignore[no-untyped-def]
    with Path("corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(["no json"] * 9))
    result = run("corpus.jsonl", "--tokenizer", "train:300", "--skip-bad")
    assert result.exit_code == 0, result.output
    assert "9 unreadable" in result.stdout
    assert result.stderr.count("Left out: ") == 5
    assert "line 51: not valid JSON" in result.stderr
    assert "4 more" in result.stderr


def test_samples_are_beginnings_of_documents(run) -> None:  # type: ignore[no-untyped-def]
    summary = json.loads(run("corpus.jsonl", "--tokenizer", "train:300", "--sample", "3", "--json").stdout)
    assert len(set(summary["samples"])) == 3
    assert all(any(text.startswith(sample) for text in DOCUMENTS) for sample in summary["samples"])
    assert summary["samples"][0] == next(text for text in DOCUMENTS if text.startswith(summary["samples"][0]))
    shown = run("corpus.jsonl", "--tokenizer", "train:300", "--sample", "2").stdout
    assert summary["samples"][0] in shown


@pytest.mark.parametrize(
    ("first", "now", "seconds", "shown"),
    [
        (Progress("p", 0, 0, 0, None), Progress("p", 10, 50_000_000, 9_000_000, None), 2.0, "25.0 MB/s"),
        (Progress("p", 0, 0, 0, 100), Progress("p", 1, 10, 25, 100), 60.0, "25%, 0.0 MB/s, 0:03:00 left"),
        (Progress("p", 0, 0, 0, None, 0.0), Progress("p", 1, 10, 25, None, 0.5), 3600.0, "50%, 0.0 MB/s, 1:00:00 left"),
        (Progress("p", 5, 10**8, 0, None, 0.5), Progress("p", 9, 2 * 10**8, 1, None, 0.75), 5.0, "20.0 MB/s, 0:00:05"),
    ],
)
def test_progress_says_speed_and_time_left_of_this_process(
    first: Progress, now: Progress, seconds: float, shown: str
) -> None:
    assert shown in progress_text(first, now, seconds)


def test_engines_that_do_not_exist_or_take_no_address(run) -> None:  # type: ignore[no-untyped-def]
    refused = run("corpus.jsonl", "--engine", "slurm")
    assert refused.exit_code == 2
    assert "--engine" in refused.output
    with pytest.raises(UsageError, match="--ray-address is for --engine ray"):
        run("corpus.jsonl", "--ray-address", "10.0.0.1:6379")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without a signal")
def test_sigterm_cleans_up_as_ctrl_c_does(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"Document {n} " * 50}) for n in range(200_000)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    partial = tmp_path / "data" / ".corpus.partial"
    command = [sys.executable, "-m", "lightlm", "prepare-data", "corpus.jsonl", "--tokenizer", "train:300"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not partial.is_dir() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert partial.is_dir()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    # On a busy machine a block may be done by then, and is kept.
    assert [path.name for path in (tmp_path / "data").iterdir()] in ([], [".corpus.partial"])
    assert list(partial.rglob(".*")) == []


def test_a_validation_split_that_says_little_is_a_warning(run) -> None:  # type: ignore[no-untyped-def]
    result = run("corpus.jsonl", "--tokenizer", "train:300", "--json")
    size = json.loads(result.stdout)["small_validation"]
    assert size is not None
    assert f"Warning: validation is {size}, so its loss says little; raise --val-fraction of " in result.stderr


def test_data_that_models_are_only_scored_on(run):  # type: ignore[no-untyped-def]
    """All documents are for validation; the tokenizer is that of the models."""
    run("corpus.jsonl", "--tokenizer", "train:300")
    command = ("corpus.jsonl", "--tokenizer", "data/corpus", "--out", "data/my texts", "--val-fraction", "1")
    shown = run(*command, "--sample", "1")
    assert "Next: lightlm eval MODEL --tasks heldout --data 'data/my texts'" in shown.stderr
    first = json.loads(Path("corpus.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    assert f"--- document 1 of the validation split\n{first[:20]}" in shown.stdout
    scored, trained = (DataFolder.open(folder).manifest for folder in ("data/my texts", "data/corpus"))
    assert scored.text_bytes == {"train": 0, "val": sum(trained.text_bytes.values())}
    assert json.loads(run(*command, "--verify", "--json").stdout)["status"] == "verified"
    teacher = ("--teacher", "my-model")
    with pytest.raises(UsageError, match="--val-fraction 1 leaves no text to train on, so a --teacher has nothing"):
        run("corpus.jsonl", "--val-fraction", "1", *teacher)
    for talks in (("skills",), ("corpus.jsonl", "--format", "chat")):
        with pytest.raises(UsageError, match="heldout does not score conversations"):
            run(*talks, "--tokenizer", "data/corpus", "--val-fraction", "1")
    with pytest.raises(UsageError, match="leaves no text for --tokenizer train:300"):
        run(*command[:2], "train:300", *command[3:])
    with pytest.raises(DataError, match="none is left to train on; choose a smaller fraction, or split the text"):
        run(*command[:-1], "0.9999999999", "--overwrite")


def test_conversations_are_shown_with_the_trained_tokens_marked(run):  # type: ignore[no-untyped-def]
    Path("talks.jsonl").write_text('{"prompt": "Name a color", "completion": "Red"}\n' * 3, encoding="utf-8")
    command = ("talks.jsonl", "--tokenizer", "train:300", "--val-fraction", "0")
    shown = run(*command, "--format", "chat", "--sample", "1").output
    assert "⟦Red<|im_end|>⟧" in shown
    assert "ChatML, which adds <|im_start|> <|im_end|>" in shown
    assert "lightlm train recipes/chat-demo.yaml data.dataset=talks" in shown  # no model has the new tokenizer
    with pytest.raises(DataError, match="the columns instruction and output were expected"):
        run(*command, "--format", "alpaca", "--out", "data/other")
    with pytest.raises(UsageError, match="--train-on last is for conversations: add --format chat"):
        run(*command, "--train-on", "last")
    with pytest.raises(UsageError, match=r"--chat-template x\.jinja: cannot be read"):
        run(*command, "--format", "chat", "--chat-template", "x.jinja")
