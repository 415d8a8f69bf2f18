"""A whole sweep with fake runs: what is fixed for all, extended, refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightlm.errors import CheckpointError, LightLMError, RecipeError, UsageError
from lightlm.limits import cores
from lightlm.processes import THREADS_VARIABLE
from lightlm.recipe import load_recipe
from lightlm.runs import locked
from lightlm.sweep import run as sweep_run
from lightlm.sweep.cells import Contestant
from lightlm.sweep.machine import Machine
from lightlm.sweep.run import Limits, Sweep
from tests.corpus import make_workspace
from tests.sweep.fleet import TOKENS, Fleet, recipe_of
from tests.train.watch import start

SHORT = (f"train.tokens={TOKENS}",)
A = Contestant("a", "tiny.yaml", SHORT, {"optimizer.lr": "1e-2"})
B = Contestant("b", "tiny.yaml", (*SHORT, "optimizer.lr=3e-3"), {"optimizer.lr": "3e-3"})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("sweep"), 60)


@pytest.fixture
def path(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("lightlm.sweep.engine._POLL_SECONDS", 0.001)
    return tmp_path / "rates"


class Instant(Fleet):
    """Each look at a run takes it to its end."""

    def start(self, arguments, environment, log):
        self.now += 1000.0
        process = super().start(arguments, environment, log)
        self.now += 1000.0
        return process


def sweep(path, contestants, seeds=(1, 2), fleet=None, limits=None, **options):
    fleet = fleet or Instant()
    with Sweep.open(path, limits or Limits(), start=fleet.start, **options) as opened:
        opened.add(contestants, seeds)
        ending = opened.run()
        return ending, fleet, opened.results()


def test_a_table_of_contestants_runs_and_compares(path):
    fleet = Instant(losses={"b_seed-1": 1.8, "b_seed-2": 1.81})
    ending, _, results = sweep(path, [A, B], fleet=fleet)
    assert ending == "complete"
    assert fleet.started == [f"new {name}" for name in ("a_seed-1", "b_seed-1", "a_seed-2", "b_seed-2")]
    assert [line.verdict for line in results.lines] == ["baseline", "better"]
    written = json.loads((path / "results.json").read_text())
    assert written["contestants"][1]["finals"] == {"1": 1.8, "2": 1.81}
    assert written["contestants"][1]["changes"] == list(B.changes)


def test_a_value_or_a_seed_more_extends_and_leaving_one_out_keeps_its_results(path):
    sweep(path, [A], seeds=(1,))
    _, fleet, _ = sweep(path, [A, B], seeds=(1,))
    assert fleet.started == ["new b_seed-1"]
    _, fleet, results = sweep(path, [B], seeds=(1, 2))
    assert fleet.started == ["new b_seed-2"]
    assert [(line.contestant.name, list(line.finals)) for line in results.lines] == [("a", [1]), ("b", [1, 2])]


def test_the_same_name_with_other_settings_is_refused_unless_they_change_no_result(path):
    sweep(path, [A])
    before = (path / "sweep.json").read_bytes()
    longer = Contestant("a", "tiny.yaml", ("train.tokens=2000",), A.values)
    with pytest.raises(
        UsageError, match=r"'a' was added with other settings: train.tokens was 1000 and is 2000; start"
    ):
        sweep(path, [longer])
    assert (path / "sweep.json").read_bytes() == before
    free = Contestant("a", "tiny.yaml", (*SHORT, "checkpoint.keep_last=1", "train.threads=1"), A.values)
    assert sweep(path, [free])[1].started == []
    _, fleet, _ = sweep(path, [longer], overwrite=True)
    assert len(fleet.started) == 2


@pytest.mark.parametrize("changes", [("train.tokens=2000",), (*SHORT, "model.num_layers=1")])
def test_new_values_of_another_base_are_refused(path, changes):
    """Otherwise one table compares runs that differ in more than it shows."""
    sweep(path, [A])
    before = (path / "sweep.json").read_bytes()
    value = Contestant("c", "tiny.yaml", (*changes, "optimizer.lr=2e-2"), {"optimizer.lr": "2e-2"})
    with pytest.raises(UsageError, match="'a' was added with other settings"):
        sweep(path, [value])
    assert (path / "sweep.json").read_bytes() == before
    other = Contestant("d", "tiny.yaml", (*SHORT, "optimizer.weight_decay=0.2"), {"optimizer.weight_decay": "0.2"})
    assert len(sweep(path, [replace(value, changes=(*SHORT, value.changes[-1])), other])[1].started) == 4


def test_a_sweep_on_another_disk_stays_linked(path, tmp_path):
    (tmp_path / "big").mkdir()
    path.symlink_to(tmp_path / "big", target_is_directory=True)
    with pytest.raises(RecipeError):
        sweep(path, [Contestant("a", "tiny.yaml", ("optimizer.rate=1",))])
    assert path.is_symlink()
    sweep(path, [A])
    (path / "runs").rename(tmp_path / "runs")
    (path / "runs").symlink_to(tmp_path / "runs", target_is_directory=True)
    for _ in range(2):
        assert len(sweep(path, [A], overwrite=True)[1].started) == 2
        assert (path / "runs").is_symlink()
        assert len(list((path / "runs").iterdir())) == 2


def test_a_sweep_is_deleted_when_the_new_one_can_start(path, monkeypatch):
    sweep(path, [A])
    (path / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for wrong, problem in (("train.rate=1", RecipeError), ("data.dataset=nowhere", LightLMError)):
        with pytest.raises(problem):
            sweep(path, [A, Contestant("wrong", "tiny.yaml", (wrong,), {})], overwrite=True)
    with Sweep.open(path, start=Instant().start, overwrite=True) as opened:
        opened.add([B], [1])
        assert [row.state for row in opened.overview().rows] == ["waiting"]
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before

    def too_few(*_):
        raise LightLMError("too few tokens")

    monkeypatch.setattr(sweep_run, "fitting_tokens", too_few)
    with pytest.raises(LightLMError, match="too few"):
        sweep(path, [B], limits=Limits(minutes=0.1), overwrite=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    _, fleet, results = sweep(path, [B], seeds=(1,), overwrite=True)
    assert fleet.started == ["new b_seed-1"]
    assert [line.contestant.name for line in results.lines] == ["b"]
    assert sorted(run.name for run in (path / "runs").iterdir()) == ["b_seed-1"]
    assert (path / "notes.txt").read_text() == "mine"


def test_an_edit_of_the_recipe_changes_no_run_of_a_sweep_that_goes_on(path):
    text = Path("tiny.yaml").read_text()
    copied = Contestant("a", "copied.yaml", SHORT, {})
    Path("copied.yaml").write_text(text)

    class Edited(Instant):
        def start(self, *arguments):
            Path("copied.yaml").write_text(text.replace("num_layers: 2", "num_layers: 3"))
            return super().start(*arguments)

    _, fleet, _ = sweep(path, [copied], fleet=Edited())
    assert load_recipe("copied.yaml").model.num_layers == 3
    recipes = [recipe_of(arguments) for arguments in fleet.arguments]
    assert recipes == [load_recipe("tiny.yaml", [*SHORT, f"train.seed={seed}"]) for seed in (1, 2)]
    with pytest.raises(UsageError, match=r"model\.num_layers was 2 and is 3"):
        sweep(path, [copied], seeds=(3,))


def test_what_a_sweep_may_change_reaches_the_runs_that_are_left(path):
    class Real(Instant):
        """Runs with the recipe of a real one."""

        def start(self, arguments, environment, log):
            process = super().start(arguments, environment, log)
            if not arguments[1].startswith("--resume"):
                (process.run / "recipe.yaml").write_text(recipe_of(arguments).to_yaml())
            return process

    free = ("train.micro_batch_size=4", "checkpoint.keep_last=3", "train.threads=auto", "train.device=auto")
    sweep(path, [Contestant("a", "tiny.yaml", (*SHORT, *free))], (1,), Real(codes={"a_seed-1": 1}))
    free = ("train.micro_batch_size=2", "checkpoint.keep_last=1", "train.threads=auto", "train.device=cpu")
    _, fleet, _ = sweep(path, [Contestant("a", "tiny.yaml", (*SHORT, *free))], (1,), Real())
    (resumed,) = fleet.arguments
    assert resumed[1].startswith("--resume=")
    # Texts without quotes: an override is read as it is.
    assert sorted(resumed[2:]) == [
        "--no-report",
        "checkpoint.keep_last=1",
        "train.device=cpu",
        "train.micro_batch_size=2",
    ]


@pytest.mark.parametrize("chosen", [None, "1"])
def test_a_recipe_that_names_its_threads_gets_them(path, monkeypatch, chosen):
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    if chosen:
        monkeypatch.setenv(THREADS_VARIABLE, chosen)
    named = Contestant("named", "tiny.yaml", (*SHORT, "train.threads=2"))
    automatic = Contestant("automatic", "tiny.yaml", (*SHORT, "train.threads=auto", "optimizer.lr=1e-3"))
    _, fleet, _ = sweep(path, [named, automatic], (1,), limits=Limits(jobs=2))
    shared = chosen or str(max(1, cores() // 2))
    assert [environment.get(THREADS_VARIABLE) for environment in fleet.environments] == [chosen, shared]


def test_two_processes_never_share_a_sweep_and_other_folders_are_left_alone(path):
    path.mkdir()
    with locked(path), pytest.raises(CheckpointError, match="rates is being run by process"):
        sweep(path, [A])
    (path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is not a sweep"):
            sweep(path, [A], overwrite=overwrite)
    assert (path / "notes.txt").read_text() == "mine"


def test_auto_precision_is_chosen_once_for_all_runs(path, monkeypatch):
    auto = [
        Contestant(entry.name, entry.recipe, (*entry.changes, "train.dtype=auto", "train.device=auto"), entry.values)
        for entry in (A, B)
    ]
    for answer in ("bfloat16", "float32"):
        monkeypatch.setattr(sweep_run, "look_at_machine", lambda recipe, dtype=answer: Machine("cpu", (), dtype))
        _, fleet, _ = sweep(path, auto, seeds=(1,) if answer == "bfloat16" else (1, 2))
        assert [arguments.count("train.dtype=bfloat16") for arguments in fleet.arguments] == [1, 1]


def test_a_precision_that_is_slow_here_is_noted_before_the_runs(path, monkeypatch):
    asked, notes = [], []
    watch = SimpleNamespace(**dict.fromkeys(("started", "ended", "progress"), lambda *_: None), note=notes.append)

    def look(recipe):
        asked.append(recipe.train.dtype)
        return Machine("cpu", (), "bfloat16", "bfloat16: products take 8 times as long")

    monkeypatch.setattr(sweep_run, "look_at_machine", look)
    sweep(path, [A], seeds=(1,), watch=watch)
    assert (asked, notes) == ([], []), "float32 needs no look"
    half = Contestant("half", "tiny.yaml", (*SHORT, "train.dtype=bfloat16"), {})
    sweep(path, [A, half], seeds=(1,), watch=watch)
    assert (asked, notes) == (["bfloat16"], ["train.dtype=bfloat16: products take 8 times as long"])


def test_all_runs_start_from_the_checkpoint_that_a_run_had_when_the_sweep_began(path):
    start("tiny.yaml", "train.tokens=512", "eval.every=0", name="origin")
    tuned = Contestant("tuned", "tiny.yaml", (*SHORT, "train.init_from=origin"), {})
    _, fleet, _ = sweep(path, [A, tuned], seeds=(1,))
    starts = [recipe_of(arguments).train.init_from for arguments in fleet.arguments]
    assert starts == [None, "runs/origin/checkpoints/step_000002"]


def test_gpus_run_one_each(path, monkeypatch):
    monkeypatch.setattr(sweep_run, "look_at_machine", lambda recipe: Machine("cuda", ("0", "1"), "bfloat16"))
    on_cuda = [Contestant(entry.name, entry.recipe, (*entry.changes, "train.device=cuda"), {}) for entry in (A, B)]
    _, fleet, _ = sweep(path, on_cuda, seeds=(1,))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in fleet.environments] == ["0", "1"]


def test_equal_time_measures_each_contestant_once_and_gives_all_seeds_the_same_tokens(path, monkeypatch):
    asked = []

    def fitting(recipe, minutes, environment):
        asked.append(recipe.optimizer.lr)
        return 2000 if recipe.optimizer.lr == 1e-2 else 3000

    monkeypatch.setattr(sweep_run, "fitting_tokens", fitting)
    _, fleet, _ = sweep(path, [A], seeds=(1,), limits=Limits(minutes=2))
    _, again, _ = sweep(path, [A, B], limits=Limits(minutes=2))
    assert asked == [1e-2, 3e-3]
    lengths = {arguments[-3].removeprefix("--name="): arguments[-4] for arguments in fleet.arguments + again.arguments}
    assert lengths["a_seed-1"] == lengths["a_seed-2"] == "train.tokens=2000"
    assert lengths["b_seed-1"] == lengths["b_seed-2"] == "train.tokens=3000"
    with pytest.raises(UsageError, match="compares at 2 minutes per run, not at equal tokens"):
        sweep(path, [A])


def test_different_tokenizers_are_compared_by_bits_per_byte(path, workspace):
    from lightlm.data.prepare.run import prepare

    if not (workspace / "data/other").exists():
        prepare(str(workspace / "tiny.jsonl"), "train:300", workspace / "data/other", val_fraction=0.1)
    other = Contestant("other", "tiny.yaml", (*SHORT, "data.dataset=other"), {})
    with Sweep.open(path, start=Instant().start) as opened:
        opened.add([A, other], [1])
        assert opened.definition.metric == "val_bpb"
        opened.run()
        assert "nats per token do not compare across them" in opened.results("loss").notes[0]


def test_a_damaged_definition_is_named(path):
    sweep(path, [A])
    nothing = '{"entries": {}, "fixed": {}, "minutes": null, "tokens": {}, "metric": null}'
    for text in ("{", nothing):
        (path / "sweep.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"sweep\.json is damaged or of another version"):
            sweep(path, [A])
