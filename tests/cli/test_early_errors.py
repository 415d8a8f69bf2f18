"""Mistakes that need no torch to find are reported before it is imported: within a second, not several."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, sys
from lightlm.cli.app import main
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lightlm", *arguments]
    try:
        main()
        code = 0
    except SystemExit as exit:
        code = exit.code
    heavy = sorted({"torch", "datasets", "lm_eval", "transformers", "scipy", "matplotlib"} & sys.modules.keys())
    found.append([code, heavy])
print(json.dumps(found))
"""

MISTAKES = {
    "train": [
        [],
        ["nosuch.yaml"],
        ["demo", "train.tokns=1"],
        ["demo", "train.device=gpu"],
        ["demo", "eval.tasks=[nosuch]"],
        ["demo"],
        ["demo", "--nproc", "2"],
        ["demo", "--auto-resume"],
        ["demo", "--resume"],
        ["--resume", "nosuch"],
        ["--resume"],
    ],
    "eval": [
        [],
        ["nosuch"],
        ["empty"],
        ["--tasks", ""],
        ["--tasks", "heldout,nosuch"],
        ["--tasks", "nosuch*"],
        ["--prefetch", "nosuch"],
        ["--device", "gpu"],
        ["--dtype", "int8"],
        ["--batch-size", "0"],
        ["--bos", "perhaps"],
        ["--compare", "nosuch"],
        ["--include-path", "nosuch"],
        ["--data-dir", "nosuch"],
        ["--out", "file.txt/x"],
    ],
    "generate": [
        ["x"],
        ["x", "--checkpoint", "nosuch"],
        ["x", "--checkpoint", "empty"],
        ["x", "--temperature", "-1"],
        ["x", "--top-p", "3"],
        ["x", "--max-new-tokens", "0"],
        ["x", "--device", "gpu"],
        ["x", "--dtype", "int8"],
    ],
    "convert": [[], ["nosuch"], ["empty"], ["--to", "nosuch"], ["--from", "nosuch"], ["x", "--dtype", "int8"]],
    "report": [[], ["nosuch"], ["--compare", "nosuch"]],
    "plan": [["nosuch"], ["demo", "train.tokns=1"], ["demo", "--device", "gpu"]],
    "prepare-data": [
        [],
        ["nosuch"],
        ["nosuch.txt"],
        ["file.txt", "--max-tokens", "x"],
        ["file.txt", "--tokenizer", "nosuch.json"],
        ["file.txt", "--val-fraction", "3"],
        ["file.txt", "--verify"],
        ["file.txt", "--decontaminate", "nosuch"],
        ["file.txt", "--mix", "a=1"],
    ],
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_found_without_heavy_imports(command, tmp_path):
    from lightlm.evaluate.tasks.index import stock_tasks

    stock_tasks()  # from now on the names of lm-eval's tasks are cached
    (tmp_path / "file.txt").write_text("text", encoding="utf-8")
    (tmp_path / "runs" / "empty").mkdir(parents=True)  # a run without checkpoints
    (tmp_path / "runs" / "empty" / "recipe.yaml").write_text("name: empty", encoding="utf-8")
    arguments = json.dumps([[command, *given] for given in MISTAKES[command]])
    done = subprocess.run(
        [sys.executable, "-c", CODE, arguments],
        cwd=tmp_path,
        env=os.environ | {"LIGHTLM_EVAL_DATA": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=100,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = [(given, answer) for given, answer in zip(MISTAKES[command], found, strict=True) if answer[0] not in (1, 2)]
    assert wrong == [], done.stderr
    assert [(given, heavy) for given, (_, heavy) in zip(MISTAKES[command], found, strict=True) if heavy] == []
