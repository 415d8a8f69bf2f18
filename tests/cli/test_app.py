import json
import os
import subprocess
import sys

import pytest

import lightlm as package
from lightlm.recipe import shipped_recipes


def test_help_and_version_answer_without_heavy_imports():
    """`--help` must answer in under half a second; torch alone takes longer to import."""
    code = """
import contextlib, sys
from lightlm.cli.app import main
sys.argv = ["lightlm", "--help"]
with contextlib.suppress(SystemExit):
    main()
heavy = {"torch", "numpy", "pydantic", "yaml", "datasets", "tokenizers", "lm_eval", "transformers", "pyarrow"}
print("HEAVY", sorted(heavy & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("prepare-data", "plan", "train", "eval", "generate", "convert", "recipes"):
        assert command in result.stdout
    assert "HEAVY []" in result.stdout


def test_version(lightlm):
    assert lightlm("--version").stdout == f"lightlm {package.__version__}\n"


@pytest.mark.parametrize("arguments", [["trane"], ["train", "--nope"], ["generate"]])
def test_wrong_usage_exits_with_2(lightlm, arguments):
    outcome = lightlm(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.stderr


def test_no_argument_is_answered_with_the_commands(lightlm):
    outcome = lightlm()
    assert outcome.code == 2
    assert "prepare-data" in outcome.stdout


def test_messages_repeat_what_was_given_letter_for_letter(lightlm):
    """Colons around a word must not become an emoji."""
    outcome = lightlm("prepare-data", "pydocs", "--tokenizer", "train:100")
    assert "train:100: write the number of entries" in outcome.stderr


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train", "lower train.micro_batch_size"),
        ("serve", "lower --batch-size"),
        ("generate", "with --jsonl, --batch-size"),
    ],
)
def test_a_device_out_of_memory_is_one_message(lightlm, monkeypatch, command, advice):
    def fail(arguments):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr("lightlm.cli.app.app", fail)
    outcome = lightlm(command, "x")
    assert outcome.code == 1
    assert outcome.stderr.startswith("Error: the device is out of memory; ")
    assert advice in outcome.stderr


def test_python_dash_m_is_the_same_command():
    result = subprocess.run([sys.executable, "-m", "lightlm", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"lightlm {package.__version__}\n"


def test_recipes_are_listed_shown_and_copied(lightlm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [path.stem for path in shipped_recipes()]
    assert all(name in lightlm("recipes", "ls").stdout for name in ("demo", "lightlm", "gpt2-124m"))
    rows = json.loads(lightlm("recipes", "ls", "--json").stdout)
    assert [row["recipe"] for row in rows] == names
    assert next(row for row in rows if row["recipe"] == "gpt2-124m")["exports_to"] == "GPT2LMHeadModel"
    text = lightlm("recipes", "show", "demo").stdout
    assert text.startswith("# ")
    assert lightlm("recipes", "cp", "demo", "mine.yaml").code == 0
    first, _, copied = (tmp_path / "mine.yaml").read_text(encoding="utf-8").partition("\n")
    assert first.startswith("# yaml-language-server: $schema=file:")  # tells editors where the schema is
    assert copied == text
    lightlm("recipes", "cp", "demo", "mine.yaml").assert_one_message("mine.yaml exists; name another file")
    lightlm("recipes", "cp", "demo", "no/where.yaml").assert_one_message("no folder no to copy to")
    lightlm("recipes", "show", "dem").assert_one_message("did you mean demo")
    (tmp_path / "powershell.yaml").write_text(text, encoding="utf-16")  # as its `>` writes
    assert lightlm("recipes", "show", "./powershell.yaml").stdout == text
    (tmp_path / "latin.yaml").write_bytes(text.encode() + b"# f\xfcr")
    lightlm("recipes", "cp", "./latin.yaml", "new.yaml").assert_one_message("is not utf-8; save the file as UTF-8")


def test_a_launchers_rank_silences_no_other_command_than_training():
    """A shell in a worker of a cluster has it too."""
    for arguments, stream in ((["ls"], "stdout"), (["show", "dem"], "stderr")):
        command = [sys.executable, "-m", "lightlm", "recipes", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "RANK": "1"})
        assert "demo" in getattr(done, stream)


def test_recipes_are_found_in_an_installed_package(tmp_path, monkeypatch):
    """A wheel carries the recipes inside the package."""
    from lightlm.recipe import recipes_folder

    (tmp_path / "lightlm" / "recipes").mkdir(parents=True)
    monkeypatch.setattr("lightlm.__file__", str(tmp_path / "lightlm" / "__init__.py"))
    assert recipes_folder() == tmp_path / "lightlm" / "recipes"
