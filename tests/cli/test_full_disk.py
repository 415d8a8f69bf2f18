"""A full disk, by a limit on the size of files: one message that names the file, and nothing lost."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import make_workspace

resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")

TRAINED = "first"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("full"), 60)
    command = [sys.executable, "-m", "lightlm", "train", "tiny.yaml", "train.tokens=512", "--name", TRAINED]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@contextlib.contextmanager
def largest_file(size):
    """Files end at this size; Python ignores the signal, so a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and ".lock" not in path.name}


@pytest.mark.parametrize(
    ("arguments", "size", "file"),
    [
        (["convert", TRAINED, "--out", "hf"], 20_000, "hf could not be written"),
        (["convert", TRAINED, "--to", "gguf", "--out", "model.gguf"], 20_000, "model.gguf could not be written"),
        (["report", TRAINED], 5_000, f"runs/{TRAINED}/plots/loss.png could not be written"),
        (["eval", TRAINED], 1_000, f"runs/{TRAINED}/eval/step_000002_heldout.json could not be written"),
        (["recipes", "cp", "demo", "mine.yaml"], 100, "mine.yaml could not be written"),
        (["train", "--resume", TRAINED, "train.tokens=768"], 400, f"runs/{TRAINED}/recipe.yaml could not be written"),
        (["prepare-data", "tiny.jsonl", "--out", "data/new", "--tokenizer", "train:320"], 5_000, "is full"),
    ],
)
def test_one_message_names_the_file(lightlm, arguments, size, file):
    before = contents(".")
    with largest_file(size):
        outcome = lightlm(*arguments)
    assert outcome.code == 1
    assert outcome.stderr.count("Error:") == 1
    assert file in " ".join(outcome.stderr.split())
    assert "Traceback" not in outcome.stderr
    assert {path: content for path, content in contents(".").items() if ".new." not in str(path)} == before


def test_answers_to_a_file_of_prompts_are_kept_and_resumed(lightlm):
    Path("prompts.jsonl").write_text('{"prompt": "The"}\n' * 9)
    arguments = ("generate", "--jsonl", "prompts.jsonl", "--checkpoint", TRAINED, "--max-new-tokens", "5")
    assert lightlm(*arguments, "--out", "whole.jsonl").code == 0
    with largest_file(700):
        outcome = lightlm(*arguments, "--out", "answers.jsonl")
    assert outcome.code == 1
    assert "answers.jsonl could not be written" in " ".join(outcome.stderr.split())
    assert 0 < Path("answers.jsonl").stat().st_size <= 700
    outcome = lightlm(*arguments, "--out", "answers.jsonl")
    assert outcome.code == 0
    assert "Resuming: " in outcome.stderr
    assert Path("answers.jsonl").read_text() == Path("whole.jsonl").read_text()


def test_a_failed_conversion_keeps_the_earlier_one(lightlm, workspace):
    assert lightlm("convert", TRAINED).code == 0
    before = contents("runs/first/hf")
    with largest_file(20_000):
        assert lightlm("convert", TRAINED, "--overwrite").code == 1
    assert contents("runs/first/hf") == before
    shutil.rmtree("runs/first/hf")


def test_a_checkpoint_that_does_not_fit_names_the_last_complete_one(lightlm):
    with largest_file(50_000):
        outcome = lightlm("train", "--resume", TRAINED, "train.tokens=1024")
    text = " ".join(outcome.stderr.split())
    assert "the checkpoint of step 4 could not be written to runs/first/checkpoints: the file is larger than" in text
    assert "the last complete one is step_000002" in text
    assert not list(Path("runs").rglob(".*.partial"))
