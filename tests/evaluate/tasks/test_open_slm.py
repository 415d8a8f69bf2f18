"""The leaderboard's tasks on small data sets of the same form."""

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from lm_eval.tasks._index import TaskIndex

from lightlm.checkpoint import LoadedModel
from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.run import prepare
from lightlm.errors import DataError
from lightlm.evaluate.compare.table import score_table
from lightlm.evaluate.harness import LightLM
from lightlm.evaluate.in_training.task_scores import TaskScores
from lightlm.evaluate.results.rows import Row, rows
from lightlm.evaluate.results.store import result_file
from lightlm.evaluate.runner import evaluate_model, run_tasks
from lightlm.evaluate.settings import Settings
from lightlm.evaluate.tasks import index
from lightlm.evaluate.tasks.arithmark import rows as arithmark_documents
from lightlm.evaluate.tasks.data_sets import DataSets
from lightlm.evaluate.tasks.manager import Tasks
from lightlm.recipe import EvalSection
from lightlm.report.build import write_report
from lightlm.report.scores import score_lines
from lightlm.train.distributed import World
from tests.evaluate.board_data import arithmark_rows, write_board, write_set
from tests.evaluate.tiny_run import write_world

PARTS = ["hellaswag", "arc_easy", "arc_challenge", "piqa"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A run, and `evals` with the board's data."""
    monkeypatch.chdir(tmp_path)
    folders = ("hellaswag", "arc", "piqa", "blimp", "lambada")
    stock = TaskIndex.build([index.ROOT / name for name in folders])  # lm-eval's whole index takes 5 s
    monkeypatch.setattr(index, "stock_tasks", lambda: stock)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    write_board(Path("evals"))
    return write_world(tmp_path, max_seq_len=128)


def scored(world: LoadedModel, *names: str, notes: list[str] | None = None) -> dict[tuple[str, str], Row]:
    said = [] if notes is None else notes
    tasks = Tasks(Settings(list(names), data_dir="evals"), said.append)
    tasks.require_data()
    return {(row.task, row.metric): row for row in rows(run_tasks(LightLM(world), tasks).results)}


def test_open_slm_scores_five_tasks_and_their_index(world: LoadedModel) -> None:
    notes: list[str] = []
    found = scored(world, "open_slm", notes=notes)
    hellaswag, easy, challenge, piqa = (found[task, "acc_norm"].value for task in PARTS)
    arithmark = found["arithmark_3", "acc_tokens"].value
    expected = ((hellaswag - 0.25) / 0.75 + ((easy + challenge) / 2 - 0.25) / 0.75 + (piqa - 0.5) / 0.5) * 100
    expected = (expected + 0.65 * (arithmark - 0.25) / 0.75 * 100) / 3.65
    assert found["open_slm", "index (off-protocol)"].value == pytest.approx(expected)
    assert notes == ["open_slm is not scored as on the leaderboard: 6 documents per task"]


def test_without_arithmark_the_part_index_is_scored_with_a_note(world: LoadedModel) -> None:
    write_board(Path("evals2"), arithmark=False)
    Path("evals").rename("whole")
    Path("evals2").rename("evals")
    notes: list[str] = []
    found = scored(world, "open_slm", notes=notes)
    hellaswag, easy, challenge, piqa = (found[task, "acc_norm"].value for task in PARTS)
    expected = ((hellaswag - 0.25) / 0.75 + ((easy + challenge) / 2 - 0.25) / 0.75 + (piqa - 0.5) / 0.5) / 3
    assert found["open_slm", "part_index (off-protocol)"].value == pytest.approx(100 * expected)
    assert ("arithmark_3", "acc") not in found
    assert "open_slm: arithmark_3 is left out: AxiomicLabs/Arithmark-3.0: " in notes[0]
    assert "lightlm eval --prefetch open_slm --data-dir evals" in notes[0]
    with pytest.raises(DataError, match=r"AxiomicLabs/Arithmark-3\.0"):  # asked for by name
        Tasks(Settings(["open_slm", "arithmark_3"], data_dir="evals")).require_data()
    (Path("evals") / "baber").rename("elsewhere")
    with pytest.raises(DataError, match="baber/piqa  for piqa"):
        Tasks(Settings(["open_slm"], data_dir="evals")).require_data()


@torch.no_grad()
def test_arithmark_divides_by_tokens_and_encodes_apart(world: LoadedModel) -> None:
    found = scored(world, "arithmark_3")
    right = {"acc": 0, "acc_tokens": 0}
    for row in arithmark_rows():
        sums, means = [], []
        for ending in row["endings"]:
            context, answer = world.tokenizer.encode(row["ctx"]), world.tokenizer.encode(ending)
            ids = torch.tensor([*context, *answer])
            logs = world.model.double()(ids[None, :-1])[0].log_softmax(-1)
            nats = [float(logs[i - 1, ids[i]]) for i in range(len(context), len(ids))]
            sums.append(math.fsum(nats))
            means.append(math.fsum(nats) / len(answer))
        right["acc"] += sums.index(max(sums)) == int(row["label"])
        right["acc_tokens"] += means.index(max(means)) == int(row["label"])
    assert right["acc"] != right["acc_tokens"]  # else the test shows nothing
    for metric, count in right.items():
        assert found["arithmark_3", metric].value == pytest.approx(count / 6)


def test_rows_of_expressions_are_read_too() -> None:
    data = datasets.Dataset.from_list([{"expression": "20 + -13 =", "options": [21.2, 7, -8, 14.0], "answer_index": 1}])
    assert arithmark_documents(data).to_list() == [
        {"context": "20 + -13 =", "endings": [" 21.2", " 7", " -8", " 14"], "label": 1}
    ]


def test_rows_of_another_form_are_named() -> None:
    data = datasets.Dataset.from_list([{"question": "20 + -13 =", "label": 1}])
    with pytest.raises(ValueError, match="its rows have question, label; they need ctx, endings, label or expression"):
        arithmark_documents(data)


def test_the_note_says_what_is_wrong_with_a_damaged_file(world: LoadedModel) -> None:
    (Path("evals/AxiomicLabs/Arithmark-3.0/default") / "train.jsonl").write_text('{"ctx": "1 +')
    notes: list[str] = []
    Tasks(Settings(["open_slm"], data_dir="evals"), notes.append).require_data()
    assert "arithmark_3 is left out: AxiomicLabs/Arithmark-3.0: " in notes[0]
    assert "JSON parse error" in notes[0]


def test_data_sets_are_read_anew_when_their_folder_changes(world: LoadedModel) -> None:
    """`datasets` knows a folder by its README.md, which stays the same here."""

    def count(folder: str) -> int:
        return len(DataSets(Path(folder)).load("baber/piqa")["validation"])

    assert count("evals") == 6
    shutil.copytree("evals", "others")
    path = Path("evals/baber/piqa/default/validation.jsonl")
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    assert (count("evals"), count("others")) == (2, 6)
    path.write_text("{")
    with pytest.raises(DatasetGenerationError):
        count("evals")


def test_the_board_is_scored_in_float32_unless_told_otherwise(world: LoadedModel) -> None:
    assert Tasks(Settings(["open_slm"], data_dir="evals")).dtype == "float32"
    assert Tasks(Settings(["open_slm"], data_dir="evals", dtype="bfloat16")).dtype == "bfloat16"
    assert Tasks(Settings(["hellaswag"], data_dir="evals")).dtype == "auto"


def test_small_lm_adds_what_there_is_data_for(world: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{"text": f"The cat sat on the {word}"} for word in ("mat", "dog")]
    write_set(Path("evals/EleutherAI/lambada_openai"), {"default": {"test": texts}})
    notes: list[str] = []
    found = scored(world, "small_lm", notes=notes)
    tasks = {task for task, _ in found}
    assert tasks == {"open_slm", *PARTS, "arithmark_3", "lambada_openai", "heldout"}
    assert any("blimp_ties is left out: nyu-mll/blimp (adjunct_island)" in note for note in notes)
    stranger = Tasks(Settings(["small_lm"], data_dir="evals"), notes.append)
    assert stranger.find_data(["some/model"]) is None
    assert "heldout" not in stranger.names
    assert any("heldout is left out" in note for note in notes)


def _without_validation(folder: Path) -> None:
    manifest = DataFolder.open(folder).manifest
    kept = [shard for shard in manifest.shards if shard.split == "train"]
    (folder / "manifest.json").write_text(manifest.model_copy(update={"shards": kept}).model_dump_json())


def _conversations(folder: Path) -> None:
    lines = [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in range(40)]
    Path("talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare("talks.jsonl", "train:300", folder, text_column=ChatColumns("chat"), val_fraction=0.5, overwrite=True)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_validation, "no validation documents"),
        (_conversations, "holds conversations"),
        (shutil.rmtree, "there is no folder data/tiny"),
    ],
)
def test_small_lm_leaves_out_what_a_folder_does_not_give(
    world: LoadedModel, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(Path("data/tiny"))
    notes: list[str] = []
    tasks = Tasks(Settings(["small_lm"], data_dir="evals"), notes.append)
    assert tasks.find_data([world.path]) is None
    assert {"heldout", "heldout_cloze"}.isdisjoint(tasks.names)
    assert any("small_lm: heldout is left out" in note and reason in note for note in notes)
    with pytest.raises(DataError):
        Tasks(Settings(["heldout"], data_dir="evals")).load(["heldout"])
    if Path("data/tiny").exists():  # while training
        folder, section = DataFolder.open(Path("data/tiny")), EvalSection(tasks=["small_lm"], data_dir="evals")
        notes.clear()
        TaskScores(section, folder, world.tokenizer, World(), notes.append)
        assert any("small_lm: heldout is left out" in note and reason in note for note in notes)
        with pytest.raises(DataError, match=reason):  # named by the user
            Tasks(Settings(["small_lm"], data_dir="evals"), notes.append).find_data([], "data/tiny")


def test_blimp_counts_ties_as_half(world: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's figure takes the first of two equal sentences, which is the right one, so it is 1.0 for ties."""
    group = "group: blimp\ntask: [blimp_wh_island, blimp_causative]\naggregate_metric_list: [{metric: acc}]\n"
    Path("few").mkdir()
    Path("few/blimp.yaml").write_text(group)  # instead of 67
    stock = index.stock_tasks() | TaskIndex.build([Path("few")])
    monkeypatch.setattr(index, "stock_tasks", lambda: stock)
    pairs = [("The cat ran.", "Cat the ran."), ("The cat sat.", "The cat sat."), ("A dog.", "A dog.")]
    pairs_of = {"train": [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]}
    write_set(Path("evals/nyu-mll/blimp"), {"wh_island": pairs_of, "causative": pairs_of})
    found = scored(world, "blimp_ties")
    first = found["blimp_causative", "acc"].value  # 1/3 for a pair that is not a tie
    assert found["blimp", "acc"].value == pytest.approx(first)
    assert found["blimp_ties", "acc_ties"].value == pytest.approx(first - 1 / 3)
    assert found["blimp_ties", "acc_ties"].higher_is_better


def test_a_training_run_gets_the_index(world: LoadedModel) -> None:
    section = EvalSection(tasks=["open_slm"], limit=4, data_dir="evals")
    notes: list[str] = []
    scores = TaskScores(section, DataFolder.open(Path("data/tiny")), world.tokenizer, World(), notes.append)
    found = [scores(world.model, Path("step_000007"), threading.Event()) for _ in range(2)]
    assert found[0] == found[1]
    assert {"open_slm/index(off-protocol)", "hellaswag/acc_norm", "arithmark_3/acc_tokens"} <= found[0].keys()
    assert notes == ["open_slm is not scored as on the leaderboard: 4 documents per task"]


def test_the_report_of_a_run_shows_the_index(world: LoadedModel) -> None:
    run = Path("runs/demo")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 7, "tokens": 70, "loss": 3.0}) + "\n")
    tasks = Tasks(Settings(["open_slm"], data_dir="evals"), lambda message: None)
    done = evaluate_model(world, tasks, "demo", lambda settings: result_file(world, settings, None))
    assert done.file is not None
    assert done.file.name == "step_000007_open_slm.json"
    [index_row] = [row for row in done.to_dict()["results"] if row["task"] == "open_slm"]
    report = write_report([run])
    table = score_table(score_lines(report.records), ["demo"])
    assert table.rows[0][:2] == ["open_slm", "index (off-protocol) ↑"]
    assert f"{index_row['value']:.2f} ± {index_row['stderr']:.2f}" in table.rows[0][-1]
