"""What benchmarks/learning.py reads from studies.yaml, and what it keeps of runs."""

import json
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


def test_a_contestant_is_a_list_of_changes_or_has_a_recipe_of_its_own(study):
    base = ["optimizer.name=muon", "optimizer.lr=1e-2"]
    assert {name: (entry.recipe, entry.changes) for name, entry in study.contestants.items()} == {
        "GPT-2": ("gpt2", ["optimizer.lr=2e-3"]),
        "dense at 40%": ("small", [*base, "train.tokens=1M"]),
        "plain": ("small", []),
    }
    assert study.settings == base
    assert study.metric == "val_bpb"
    assert study.seeds == {"GPT-2": [1, 2], "dense at 40%": [1, 2, 3], "plain": [1, 2]}
    assert all(entry.path.is_file() for entry in study.contestants.values())


def test_seeds_of_a_contestant_that_does_not_exist_are_refused(learning, study):
    learning.TABLE.write_text(STUDIES.replace("{dense at 40%:", "{dense at 50%:"), encoding="utf-8")
    with pytest.raises(SystemExit, match="seeds_of names dense at 50%"):
        learning.read_studies()


def test_every_shipped_contestant_is_a_recipe_without_mistakes(learning):
    for study in learning.read_studies().values():
        for entry in study.contestants.values():
            load_recipe(entry.path, [*study.settings, *entry.changes])


def test_the_committed_page_is_that_of_the_committed_results(learning):
    committed = BENCHMARKS.parent / "docs" / "ladder.md"
    assert committed.read_text(encoding="utf-8") == learning.page(), (
        "run `python benchmarks/learning.py --page docs/ladder.md`"
    )


def test_a_study_keeps_validations_speeds_sizes_and_states(learning, study, tmp_path):
    sweep, entries = folder(tmp_path / "sweep"), {}
    for name, seeds in (("plain", (1,)), ("GPT-2", (1, 2))):  # the study's baseline was added later
        contestant = Contestant(name, "demo", ())
        entries[name] = Entry(contestant, list(seeds), {"train": {}, "model": {}})
        for seed in seeds:
            run = sweep.run(Cell(contestant, seed))
            run.mkdir()
            recipe = load_recipe("demo", ["model.vocab_size=512", "data.dataset=here", "train.tokens=12K"])
            (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            (run / "machine.json").write_text(json.dumps({"processor": "Abacus", "device": "cpu", "extra": 1}))
            rows = [
                {"step": i, "tokens": 4096 * i, "seconds": float(i), "loss": 5.0, "tokens_per_second": speed}
                for i, speed in ((1, 900.0), (2, 1000.0), (3, 4.0))  # the last step was paused
            ]
            rows[0] |= {"val_loss": 6.0, "val_bpb": 2.0}
            rows[2] |= {"val_loss": 5.0 + seed, "val_bpb": 1.5}
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            sweep.record(Cell(contestant, seed), End("done" if name == "GPT-2" else "diverged", 5.0))
    definition = Definition(entries)
    record = json.loads(json.dumps(learning._record(study, read_results(sweep, definition, "val_loss"))))
    assert list(record["contestants"]) == ["GPT-2", "plain"]
    gpt2, plain = record["contestants"]["GPT-2"], record["contestants"]["plain"]
    assert gpt2["runs"] == {
        "1": [[4096, 1, 6.0, 2.0], [12288, 3, 6.0, 1.5]],
        "2": [[4096, 1, 6.0, 2.0], [12288, 3, 7.0, 1.5]],
    }
    assert gpt2["tokens_per_second"] == {"1": 900.0, "2": 900.0}
    with torch.device("meta"):
        model = Transformer(recipe.model)
    assert gpt2["parameters"]["flops_per_token"] == model.flops_per_token(256)
    assert gpt2["parameters"]["active"] == model.num_parameters()["total"]
    assert (gpt2["recipe"], gpt2["changes"]) == ("gpt2", ["optimizer.lr=2e-3"])
    assert plain["states"] == {"1": "diverged"}
    assert plain["runs"] == {}
    assert record["machine"] == {"processor": "Abacus", "device": "cpu"}
    assert (record["metric"], record["settings"]) == ("val_bpb", study.settings)
    assert learning.evidence_page.table(record).count("| diverged |") == 1
