"""What benchmarks/learning.py reads from studies.yaml, and what it keeps of runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightlm.model.transformer import Transformer
from lightlm.recipe import load_recipe
from lightlm.sweep.cells import Cell, Contestant
from lightlm.sweep.folder import Definition, End, Entry
from lightlm.sweep.table import read_results
from tests.sweep.fleet import folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def learning(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import learning

    return learning


def test_a_reader_that_leaves_ends_no_table():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, BENCHMARKS / "learning.py", "gpt2", "--table"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (
            1,
            "Error: the output could not be written (No space left on device)\n",
        )


STUDIES = """
anchors:
  base: &base [optimizer.name=muon, optimizer.lr=1e-2]
studies:
  decisive:
    question: Which?
    recipe: small
    metric: val_bpb
    settings: [*base]
    seeds: [1, 2]
    seeds_of: {dense at 40%: [1, 2, 3]}
    contestants:
      GPT-2: {recipe: gpt2, changes: [optimizer.lr=2e-3]}
      dense at 40%: [*base, train.tokens=1M]
      plain: []
"""


@pytest.fixture
def study(learning, tmp_path, monkeypatch):
    (tmp_path / "studies.yaml").write_text(STUDIES, encoding="utf-8")
    monkeypatch.setattr(learning, "TABLE", tmp_path / "studies.yaml")
    return learning.read_studies()["decisive"]


def test_a_contestant_is_a_list_of_changes_or_has_a_recipe_of_its_own(learning, study):
    base = ["optimizer.name=muon", "optimizer.lr=1e-2"]
    assert {name: (entry.recipe, entry.changes) for name, entry in study.contestants.items()} == {
        "GPT-2": ("gpt2", ["optimizer.lr=2e-3"]),
        "dense at 40%": ("small", [*base, "train.tokens=1M"]),
        "plain": ("small", []),
    }
    assert study.settings == base
    assert study.metric == "val_bpb"
    assert study.seeds == {"GPT-2": [1, 2], "dense at 40%": [1, 2, 3], "plain": [1, 2]}
    assert all(learning.evidence.recipe_path(entry.recipe).is_file() for entry in study.contestants.values())


def test_seeds_of_a_contestant_that_does_not_exist_are_refused(learning, study):
    learning.TABLE.write_text(STUDIES.replace("{dense at 40%:", "{dense at 50%:"), encoding="utf-8")
    with pytest.raises(SystemExit, match="seeds_of names dense at 50%"):
        learning.read_studies()


def test_every_shipped_contestant_is_a_recipe_without_mistakes(learning):
    for study in learning.read_studies().values():
        for entry in study.contestants.values():
            load_recipe(str(learning.evidence.recipe_path(entry.recipe)), [*study.settings, *entry.changes])


def test_the_committed_page_is_that_of_the_committed_results(learning):
    committed = BENCHMARKS.parent / "docs" / "ladder.md"
    assert committed.read_text(encoding="utf-8") == learning.page(), (
        "run `python benchmarks/learning.py --page docs/ladder.md`"
    )


def ended_sweep(path, runs, processor="Abacus"):
    """The results of a sweep of the demo's shape; `runs` says for each contestant how its seeds ended."""
    sweep, entries = folder(path), {}
    for name, seeds in runs.items():
        contestant = Contestant(name, "demo", ())
        entries[name] = Entry(contestant, list(seeds), {"train": {}, "model": {}})
        for seed, state in seeds.items():
            run = sweep.run(Cell(contestant, seed))
            run.mkdir()
            recipe = load_recipe("demo", ["model.vocab_size=512", "data.dataset=here", "train.tokens=12K"])
            (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            (run / "machine.json").write_text(json.dumps({"processor": processor, "device": "cpu", "extra": 1}))
            rows = [
                {"step": i, "tokens": 4096 * i, "seconds": float(i), "loss": 5.0, "tokens_per_second": speed}
                for i, speed in ((1, 900.0), (2, 1000.0), (3, 4.0))  # the last step was paused
            ]
            rows[0] |= {"val_loss": 6.0, "val_bpb": 2.0}
            rows[2] |= {"val_loss": 5.0 + seed, "val_bpb": 1.5}
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            sweep.record(Cell(contestant, seed), End(state, 5.0))
    return read_results(sweep, Definition(entries), "val_loss")


def recorded(learning, study, results):
    """The record of a sweep as the file of results holds it; it becomes that file."""
    record = json.loads(json.dumps(learning._record(study, results, learning._known(study), study.seeds)))
    (learning.RESULTS / f"{study.name}.json").write_text(json.dumps(record), encoding="utf-8")
    return record


@pytest.fixture(autouse=True)
def _results(request, tmp_path, monkeypatch):
    if "study" in request.fixturenames:
        (tmp_path / "results").mkdir()
        monkeypatch.setattr(request.getfixturevalue("learning"), "RESULTS", tmp_path / "results")


def test_a_study_keeps_validations_speeds_sizes_and_states(learning, study, tmp_path):
    # The study's baseline was added to the sweep later.
    runs = {"plain": {1: "diverged"}, "GPT-2": {1: "done", 2: "done"}}
    record = recorded(learning, study, ended_sweep(tmp_path / "sweep", runs))
    assert list(record["contestants"]) == ["GPT-2", "plain"]
    gpt2, plain = record["contestants"]["GPT-2"], record["contestants"]["plain"]
    assert gpt2["runs"] == {
        "1": [[4096, 1, 6.0, 2.0], [12288, 3, 6.0, 1.5]],
        "2": [[4096, 1, 6.0, 2.0], [12288, 3, 7.0, 1.5]],
    }
    assert gpt2["tokens_per_second"] == {"1": 900.0, "2": 900.0}
    with torch.device("meta"):
        model = Transformer(load_recipe("demo", ["model.vocab_size=512"]).model)
    assert gpt2["parameters"]["flops_per_token"] == model.flops_per_token(256)
    assert gpt2["parameters"]["active"] == model.num_parameters()["total"]
    assert (gpt2["recipe"], gpt2["changes"]) == ("gpt2", ["optimizer.lr=2e-3"])
    assert plain["states"] == {"1": "diverged"}
    assert plain["runs"] == {}
    assert record["machine"] == {"processor": "Abacus", "device": "cpu"}
    assert (record["metric"], record["settings"]) == ("val_bpb", study.settings)
    assert learning.evidence_page.table(record).count("| diverged |") == 1


def test_another_machine_completes_a_study(learning, study, tmp_path, monkeypatch):
    here = {"GPT-2": {1: "done", 2: "done"}, "plain": {1: "diverged", 2: "interrupted"}}
    recorded(learning, study, ended_sweep(tmp_path / "a", here))
    added = []

    class Sweeps:
        def __init__(self, path, *_, **__):
            self.folder = folder(tmp_path / "b" / "sweep")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        open = classmethod(lambda cls, *arguments, **options: cls(*arguments, **options))

        def add(self, contestants, seeds):
            added.extend((contestant.name, *seeds) for contestant in contestants)

        def run(self):
            return "complete"

        def results(self):
            there = {
                "GPT-2": {1: "done"},
                "plain": {2: "done"},
                "dense at 40%": {2: "done", 3: "done", 1: "interrupted"},
            }
            return ended_sweep(tmp_path / "b", there, "Zuse")

    monkeypatch.setattr("lightlm.sweep.run.Sweep", Sweeps)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    assert learning.run_study(study, tmp_path, 1, None, missing=True)
    assert sorted(added) == [("dense at 40%", 1), ("dense at 40%", 2), ("dense at 40%", 3), ("plain", 2)]
    record = json.loads((learning.RESULTS / "decisive.json").read_text(encoding="utf-8"))
    gpt2, dense, plain = record["contestants"].values()
    assert (list(gpt2["runs"]), list(dense["runs"]), list(plain["runs"])) == (["1", "2"], ["2", "3"], ["2"])
    assert (dense["states"], plain["states"]) == ({"1": "interrupted"}, {"1": "diverged"})
    assert record["machine"]["processor"] == "Zuse", "most runs are from there"
    assert {seed: machine["processor"] for seed, machine in gpt2["elsewhere"].items()} == {"1": "Abacus", "2": "Abacus"}
    page = learning.evidence_page.table(record)
    assert "On another machine (processor Abacus, device cpu): GPT-2, seed 1 and 2." in page
    assert "Zuse" not in page


def test_a_study_that_lacks_nothing_trains_nothing(learning, study, tmp_path, monkeypatch, capsys):
    everything = {name: dict.fromkeys(seeds, "done") for name, seeds in study.seeds.items()}
    before = recorded(learning, study, ended_sweep(tmp_path / "a", everything))
    monkeypatch.setattr("lightlm.sweep.run.Sweep", None)
    assert learning.run_study(study, tmp_path, 1, None, missing=True)
    assert json.loads((learning.RESULTS / "decisive.json").read_text(encoding="utf-8")) == before
    changed = STUDIES.replace("optimizer.lr=2e-3", "optimizer.lr=4e-3")
    learning.TABLE.write_text(changed, encoding="utf-8")
    assert list(learning._known(learning.read_studies()["decisive"])) == ["dense at 40%", "plain"]
    assert "left out 'GPT-2', which has other settings" in capsys.readouterr().err
