"""Draws of a search, and a search that is killed and goes on."""

import math

import pytest

from lightlm.errors import RecipeError
from lightlm.sweep import search as search_module
from lightlm.sweep.run import Limits, Sweep
from lightlm.sweep.search import draw, run_search
from lightlm.sweep.values import Range
from tests.corpus import make_workspace
from tests.sweep.fleet import TOKENS, Fleet, recipe_of

pytest.importorskip("optuna", reason="optuna is not installed; it is in the extra [search]")

SPACE = {
    "optimizer.lr": Range(1e-4, 1e-1, whole=False),
    "optimizer.name": ["adamw", "muon"],
    "model.num_layers": Range(1, 4, True),
}
FIXED = [f"train.tokens={TOKENS}"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("search"), 60)


@pytest.fixture
def path(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("lightlm.sweep.engine._POLL_SECONDS", 0.001)
    return tmp_path / "found"


class Instant(Fleet):
    """Runs that end at the first look; the loss is the distance of the rate to 1e-2, in decades. `dies` starts fail."""

    def __init__(self, dies=10**9):
        super().__init__()
        self.dies = dies

    def start(self, arguments, environment, log):
        if len(self.started) == self.dies:
            raise KeyboardInterrupt
        process = super().start(arguments, environment, log)
        if not arguments[1].startswith("--resume"):
            drawn = not process.run.name.startswith("recipe_")
            rate = recipe_of(arguments).optimizer.lr
            self.losses[process.run.name] = 2 + abs(math.log10(rate) + 2) if drawn else 4.0
        self.now += 1e6
        return process


def search(path, fleet, trials, space=SPACE, seeds=(1,), jobs=1):
    with Sweep.open(path, Limits(jobs=jobs), start=fleet.start) as sweep:
        ending = run_search(sweep, "tiny.yaml", space, FIXED, seeds, trials, None)
        return ending, sweep.results()


def test_draws_lie_in_the_space_and_are_repeatable():
    trials = []
    for number in range(12):
        values = draw(SPACE, trials, seed=number)
        assert values == draw(SPACE, trials, seed=number)
        assert 1e-4 <= float(values["optimizer.lr"]) <= 1e-1
        assert values["optimizer.name"] in ("adamw", "muon")
        assert int(values["model.num_layers"]) in range(1, 5)
        trials.append((values, math.inf if number == 3 else float(number)))
    assert len({values["optimizer.lr"] for values, _ in trials}) == 12
    assert len(values["optimizer.lr"]) <= 8  # three digits: it names a folder


def test_what_is_known_draws_it_to_the_better_values():
    rates = {"optimizer.lr": Range(1e-5, 1.0, whole=False)}
    good = [
        ({"optimizer.lr": f"{10**-x:.3g}"}, abs(x - 3)) for x in (0.5, 1, 1.5, 2, 2.5, 2.9, 3, 3.1, 3.5, 4, 4.5)
    ] * 2
    drawn = [float(draw(rates, good, seed)["optimizer.lr"]) for seed in range(20)]
    assert sum(1e-4 < rate < 1e-2 for rate in drawn) > 14  # 2 of 5 decades


def test_trials_of_another_space_are_left_out():
    trials = [({"optimizer.lr": "5"}, 1.0), ({"other": "1"}, 1.0), ({"optimizer.lr": "1e-3"}, 2.0)]
    values = draw({"optimizer.lr": Range(1e-4, 1e-2, whole=False)}, trials, seed=0)
    assert 1e-4 <= float(values["optimizer.lr"]) <= 1e-2


def test_a_search_runs_the_recipe_and_some_draws_and_ends_best_first(path):
    fleet = Instant()
    ending, results = search(path, fleet, 5, seeds=(1, 2))
    assert ending == "complete"
    assert len(fleet.started) == 2 * (1 + 5)
    assert results.baseline == "recipe"
    best = results.best_first()
    assert [line.mean for line in best] == sorted(line.mean for line in best)


def test_a_killed_search_goes_on_with_the_same_draws(path, tmp_path):
    whole = Instant()
    search(path, whole, 5)
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        search(other, Instant(dies=3), 5)
    rest = Instant()
    _, results = search(other, rest, 5)
    assert whole.started[3:] == rest.started
    assert len(results.lines) == 6
    more = Instant()
    search(other, more, 7)
    assert len(more.started) == 2


class Failing(Instant):
    """The first runs fail, as many as `fail`."""

    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def start(self, arguments, environment, log):
        process = super().start(arguments, environment, log)
        if len(self.started) <= self.fail:
            self.codes[process.run.name] = 1
        else:
            self.codes.pop(process.run.name, None)
        return process


def test_what_fails_is_tried_once_per_call(path):
    fleet = Failing(2)
    _, results = search(path, fleet, 4)
    assert len(fleet.started) == 1 + 4
    assert sorted(state for line in results.lines for state in line.states.values()) == ["done"] * 3 + ["failed"] * 2
    again = Instant()
    _, results = search(path, again, 4)
    assert again.started == [started.replace("new", "resume") for started in fleet.started[:2]]
    assert {state for line in results.lines for state in line.states.values()} == {"done"}


def test_several_runs_at_a_time_are_different_draws(path):
    fleet = Instant()
    search(path, fleet, 6, jobs=3)
    assert len(set(fleet.started)) == 7


def test_a_small_space_ends_the_search(path):
    _, results = search(path, Instant(), 50, space={"optimizer.name": ["adamw", "muon"]})
    assert len(results.lines) <= 3


def test_draws_that_give_no_recipe_are_passed_over(path):
    space = {"model.num_heads": ["4", "5"], "optimizer.lr": Range(1e-3, 1e-2, whole=False)}  # 5 does not divide 32
    _, results = search(path, Instant(), 4, space=space)
    assert [line.contestant.values["model.num_heads"] for line in results.lines[1:]] == ["4"] * 4


@pytest.mark.parametrize("space", [{"model.num_heads": ["5", "7"]}, {"optimizer.lrr": Range(1e-4, 1e-2, whole=False)}])
def test_a_space_without_a_valid_recipe_is_refused_before_the_baseline_runs(path, space):
    fleet = Instant()
    with pytest.raises(RecipeError, match=r"num_heads|optimizer\.lrr: unknown key"):
        search(path.with_name("none"), fleet, 2, space=space)
    assert not fleet.started


def test_without_optuna_one_message_says_how_to_get_it(path, monkeypatch):
    import sys

    from lightlm.errors import UsageError

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r'--editable "\.\[search\]"'):
        search_module.require_optuna()
