"""Every `lightlm` command in the README and the guides runs as written, in their order, on small stand-ins.

A loopback Hub serves HuggingFaceFW/fineweb-edu. Folders named like the Hub's (Rowan/hellaswag, gpt2) take its place,
and recipes in ./recipes take that of the shipped ones: the commands themselves are unchanged.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lightlm.data.sources import skills
from lightlm.data.sources.hub.names import parse_hub
from lightlm.data.tokenizer import train_tokenizer
from lightlm.recipe import load_recipe
from tests.cli.runner import Runner
from tests.corpus import texts
from tests.hub import Hub
from tests.hub_data import REPO, make_dataset, make_fineweb_edu, use

README = Path(__file__).parents[2] / "README.md"
GUIDES = README.parent / "docs" / "guides"

# Commands that need what no stand-in gives.
NEEDS_MORE = (
    "hf:org/name",  # a name to fill in
    "SmolLM2-135M",  # the Hub
    "--weights",  # a run with train.ema
    "model-Q4_1.gguf",  # somebody's file
    "ollama",  # another program
    "hf auth",  # another program
    "--push",  # the Hub
    "open_slm",  # the tasks' data
    "gsm8k",
    "small_lm",
    "--fold",  # a model with scales
    "--average",  # more checkpoints
    "--show",  # a sweep that has run
    "--search",  # optuna
    "pip install",
    "sweeps/",  # a sweep that has run
    "--download-only",
    "HF_HUB_OFFLINE=1",
    "-m lightlm.evaluate",  # another program
    "--nnodes",
    "srun",
    "#",
)


def commands(page):
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip()]


def runnable(page):
    return [line for line in commands(page) if not any(need in line.partition(" #")[0] for need in NEEDS_MORE)]


def guide_commands(name):
    return runnable(GUIDES / f"{name}.md")


def write_hellaswag(folder):
    """The columns that lm-eval's stock task reads."""
    folder.joinpath("data").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [
            {
                "ind": i,
                "activity_label": "Walking",
                "ctx_a": "The old clock watches",
                "ctx_b": "",
                "ctx": "The old clock watches",
                "endings": ["the morning.", "a letter.", "seven stones.", "a song."],
                "source_id": f"activitynet~v_{i}",
                "split": "train",
                "split_type": "indomain",
                "label": str(i % 4),
            }
            for i in range(6)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"data/{split}-00000-of-00001.parquet")


def write_conversations(folder):
    talks = [
        [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:80]}] for text in texts(40)
    ]
    folder.joinpath("data").mkdir(parents=True)
    pq.write_table(pa.table({"messages": talks}), folder / "data/train-00000-of-00001.parquet")
    return folder


def write_recipe(path, name):
    """The shipped recipe's architecture in sizes that train in a second."""
    values = yaml.safe_load(load_recipe(name).to_yaml())
    values["model"] |= {"num_layers": 2, "hidden_size": 36, "num_heads": 6, "num_kv_heads": 3, "head_dim": 0}
    values["model"] |= {"intermediate_size": 64, "max_seq_len": 64}
    values["train"] |= {"tokens": 8192, "batch_tokens": 2048, "device": "cpu"}
    values["eval"] |= {"every": 0, "tokens": 1024, "max_new_tokens": 4}
    values["checkpoint"] |= {"every": 2048}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(skills, "CONVERSATIONS", 300)
    with Hub() as hub:
        hub.add(REPO, make_fineweb_edu(tmp_path / "served", texts(300)))
        for number, name in enumerate(("cosmopedia-v2", "finemath")):
            request = parse_hub(name, "text")
            hub.add(request.repo, make_dataset(tmp_path / f"served-{name}", request.config, texts(80, seed=3 + number)))
        (tmp_path / "served-gpt2").mkdir()
        train_tokenizer(texts(100), 320).save(tmp_path / "served-gpt2" / "tokenizer.json")
        hub.add("openai-community/gpt2", tmp_path / "served-gpt2", kind="models")
        hub.add("HuggingFaceTB/smol-smoltalk", write_conversations(tmp_path / "served-smoltalk"))
        use(hub, tmp_path / "cache", monkeypatch)
        yield write_stand_ins(tmp_path)


def write_stand_ins(tmp_path):
    write_hellaswag(tmp_path / "Rowan" / "hellaswag")
    (tmp_path / "recipes").mkdir()
    for name in ("moe", "lightlm", "demo", "speedrun", "chat-demo"):
        write_recipe(tmp_path / "recipes" / f"{name}.yaml", name)
    (tmp_path / "my-books").mkdir()
    for number, text in enumerate(texts(60, seed=1)):
        (tmp_path / "my-books" / f"{number}.txt").write_text(text * 4, encoding="utf-8")
    rows = [{"text": text, "score": number % 5, "language": "en"} for number, text in enumerate(texts(40, seed=2))]
    (tmp_path / "scored.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The old clock"}\n', encoding="utf-8")
    return tmp_path


def run_processes(line):
    """A command that starts processes, with two of them, as far as their plan: trained with elsewhere."""
    if sys.platform != "linux":
        return
    program, *arguments = shlex.split(
        line.replace("nproc 8", "nproc 2").replace("per-node 8", "per-node 2"), comments=True
    )
    module = {"lightlm": "lightlm", "torchrun": "torch.distributed.run"}[program]
    outcome = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--dry-run"], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, (line, outcome.stderr)
    assert re.search(r"processes\D+2\b", outcome.stdout), outcome.stdout


def run_all(run, lines):
    """Run commands in this process, and return the names of those that ran."""
    ran = set()
    for line in lines:
        if "nproc" in line:
            run_processes(line)
            continue
        program, *arguments = shlex.split(line, comments=True)
        if program == "cd":  # `cd "$(lightlm runs path)"`
            continue
        assert program == "lightlm", line
        if arguments[:2] == ["runs", "rm"]:  # asks, and these runs do not exist here
            continue
        if arguments[0] == "plan":
            arguments.append("--no-probe")  # of 135M parameters: minutes
        if arguments[0] == "sweep":
            arguments.append("--dry-run")  # tests/cli/test_sweep.py runs real ones
        # train:8192 finds no 8,192 entries in a small corpus, which is allowed, and takes what there is.
        outcome = run(*arguments)
        assert outcome.code == 0, (line, outcome.stderr)
        ran.add(arguments[0])
    return ran


@pytest.mark.timeout(600)
def test_the_readmes_commands_run(stand_ins, monkeypatch, capsys):
    ran = run_all(Runner(monkeypatch, capsys), runnable(README))
    assert ran == {"prepare-data", "plan", "train", "eval", "generate", "convert", "report", "recipes", "sweep"}
    latest = json.loads((stand_ins / "runs/moe/hf/config.json").read_text())
    assert latest["architectures"] == ["Glm4MoeForCausalLM"]
    assert (stand_ins / "runs/books/eval").is_dir()
    assert list((stand_ins / "runs/moe/eval").glob("*hellaswag*.json"))


def test_the_speedruns_commands_run(stand_ins, monkeypatch, capsys):
    run_all(Runner(monkeypatch, capsys), runnable(GUIDES.parent / "speedrun.md"))
    scores = [
        json.loads(path.read_text(encoding="utf-8")) for path in stand_ins.glob("runs/speedrun/eval/*heldout*.json")
    ]
    assert any("bits_per_byte,none" in found.get("results", {}).get("heldout", {}) for found in scores)


@pytest.mark.timeout(900)
def test_the_guides_commands_run(stand_ins, monkeypatch, capsys):
    run = Runner(monkeypatch, capsys)
    run_all(run, guide_commands("data"))
    staged = yaml.safe_load((stand_ins / "runs/moe-staged/recipe.yaml").read_text(encoding="utf-8"))
    assert set(staged["data"]["stages"][1]["mix"]) == {"fineweb-edu", "cosmopedia-v2", "finemath"}
    run_all(run, ["lightlm prepare-data pydocs --tokenizer train:512 --max-tokens 100K"])
    run_all(run, guide_commands("recipes") + guide_commands("training") + ["lightlm train recipes/moe.yaml"])
    run_all(run, guide_commands("evaluation") + guide_commands("generation") + guide_commands("conversion"))
    run_all(run, guide_commands("clusters") + guide_commands("sweeps"))
    assert list((stand_ins / "runs/moe/eval").glob("*hellaswag*.json"))
    assert (stand_ins / "demo-hf" / "config.json").is_file()


def test_readme_is_short_and_names_no_page_that_is_missing():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (README.parent / target).exists(), target


def test_the_readmes_make_targets_exist():
    makefile = README.with_name("Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:`|^ {4})make ([\w-]+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"demo", "test", "check"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
