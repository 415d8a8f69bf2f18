"""What the engine starts, when, and how it takes up again what was stopped; the runs are fakes on their own clock."""

import os
import signal

import pytest

from lightlm.errors import TrainingDivergedError
from lightlm.limits import cores
from lightlm.runs import locked
from lightlm.sweep import engine as engine_module
from lightlm.sweep.cells import Cell, Contestant
from lightlm.sweep.engine import Engine, Watch, environments
from tests.sweep.fleet import TOKENS, Fleet, folder

A, B, C = (Contestant(name, "demo") for name in "abc")
CELLS = [Cell(contestant, seed) for seed in (1, 2) for contestant in (A, B, C)]
NAMES = ["a_seed-1", "b_seed-1", "c_seed-1", "a_seed-2", "b_seed-2", "c_seed-2"]


class Recorder(Watch):
    def __init__(self):
        self.ends, self.notes, self.lefts = {}, [], []

    def ended(self, row, end, overview):
        self.ends[row.cell.name] = end

    def progress(self, overview):
        self.lefts.append(overview.left)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def sweep(tmp_path):
    return folder(tmp_path / "sweep")


def engine(sweep, fleet, jobs=1, cells=CELLS, **options):
    tokens = dict.fromkeys("abc", TOKENS)
    options = {"start": fleet.start, "clock": fleet.clock, "sleep": fleet.sleep} | options
    return Engine(sweep, cells, tokens, places=environments(jobs), **options)


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_every_cell_runs_once_in_order_and_at_most_some_at_a_time(sweep, jobs):
    fleet = Fleet()
    assert engine(sweep, fleet, jobs).run() == "complete"
    assert fleet.started == [f"new {name}" for name in NAMES]
    assert fleet.most_at_a_time == jobs
    assert [sweep.status(cell).state for cell in CELLS] == ["done"] * 6
    assert fleet.arguments[0] == [
        "train",
        "demo",
        "train.seed=1",
        "--name=a_seed-1",
        f"--runs-dir={sweep.runs}",
        "--no-report",
    ]


def test_a_second_call_repeats_nothing(sweep):
    engine(sweep, Fleet()).run()
    again = Fleet()
    assert engine(sweep, again).run() == "complete"
    assert again.started == []


def test_failed_runs_stop_no_others_and_are_tried_again_but_diverged_ones_are_results(sweep):
    fleet, watch = Fleet(codes={"a_seed-1": TrainingDivergedError.exit_code, "b_seed-1": 1, "c_seed-1": -9}), Recorder()
    assert engine(sweep, fleet, watch=watch).run() == "complete"
    assert len(fleet.started) == 6
    states = {name: end.state for name, end in watch.ends.items()}
    assert states == dict.fromkeys(NAMES, "done") | {"a_seed-1": "diverged", "b_seed-1": "failed", "c_seed-1": "failed"}
    assert watch.ends["b_seed-1"].message == "no room at step 8;\ntry something else"
    if os.name != "nt":
        assert watch.ends["c_seed-1"].message.startswith("the process was ended by SIGKILL")
    again = Fleet()
    engine(sweep, again).run()
    assert again.started == ["resume b_seed-1", "resume c_seed-1"]
    assert [sweep.status(cell).state for cell in CELLS] == ["diverged", *["done"] * 5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *([] if os.name == "nt" else [signal.SIGHUP])])
def test_a_signal_lets_the_runs_save_and_the_next_call_resumes_them(sweep, number):
    fleet = Fleet()
    fleet.at[15.0] = lambda: signal.raise_signal(number)
    assert engine(sweep, fleet, jobs=2).run() == "interrupted"
    assert fleet.started == [f"new {name}" for name in NAMES[:4]]
    assert [sweep.status(cell).state for cell in CELLS] == [
        "done",
        "done",
        "interrupted",
        "interrupted",
        "waiting",
        "waiting",
    ]
    again = Fleet()
    assert engine(sweep, again, jobs=2).run() == "complete"
    assert again.started == ["resume c_seed-1", "resume a_seed-2", "new b_seed-2", "new c_seed-2"]
    assert again.now < 17  # two halves, then two runs
    assert sweep.end(CELLS[2]).seconds == pytest.approx(10, abs=1)  # over both calls


def test_a_second_ctrl_c_kills(sweep):
    class Deaf(Fleet):
        def start(self, *arguments):
            process = super().start(*arguments)
            process.send_signal = lambda number: None
            return process

    fleet = Deaf(seconds={"a_seed-1": 1e9})
    fleet.at = {2.0: lambda: signal.raise_signal(signal.SIGINT), 4.0: lambda: signal.raise_signal(signal.SIGINT)}
    assert engine(sweep, fleet).run() == "interrupted"
    assert fleet.now < 6


def test_a_budget_starts_nothing_that_would_end_later_and_the_next_call_goes_on(sweep):
    fleet = Fleet()
    assert engine(sweep, fleet, budget=35.0).run() == "budget"
    assert fleet.started == [f"new {name}" for name in NAMES[:3]]  # the fourth would end after 40 s
    assert fleet.now < 35
    assert engine(sweep, again := Fleet()).run() == "complete"
    assert again.started == [f"new {name}" for name in NAMES[3:]]


def test_a_shorter_run_still_fits_into_a_budget(sweep):
    fleet = Fleet(seconds={"a_seed-1": 10, "b_seed-1": 2, "c_seed-1": 10, "a_seed-2": 10})
    engine(sweep, fleet, budget=27.0).run()
    assert fleet.started == [f"new {name}" for name in ("a_seed-1", "b_seed-1", "c_seed-1", "b_seed-2")]


def test_a_run_that_takes_longer_than_the_budget_is_saved_and_stopped(sweep):
    fleet = Fleet(seconds={"a_seed-1": 100})
    assert engine(sweep, fleet, budget=50.0).run() == "budget"
    assert 50 <= fleet.now < 51
    assert sweep.status(CELLS[0]).state == "interrupted"
    assert sweep.status(CELLS[0]).share == pytest.approx(0.5, abs=0.01)


def test_the_process_of_a_killed_sweep_is_waited_for_and_not_doubled(sweep):
    killed = Fleet()
    process = killed.start(["train", "demo", "--name=a_seed-1", f"--runs-dir={sweep.runs}"], {}, sweep.log(CELLS[0]))
    lock = locked(process.run)
    lock.__enter__()

    def end():
        killed.now = 5.0  # half-way
        process.send_signal(signal.SIGTERM)
        process.poll()
        lock.__exit__(None, None, None)

    fleet, watch = Fleet(), Recorder()
    fleet.at[30.0] = end
    assert engine(sweep, fleet, watch=watch, cells=CELLS[:2]).run() == "complete"
    assert fleet.started == ["resume a_seed-1", "new b_seed-1"]
    assert 30 + 5 + 10 <= fleet.now < 47
    assert "is still being trained by an earlier sweep's process" in watch.notes[0]


def test_the_time_left_is_known_from_the_first_run_on(sweep):
    fleet, watch = Fleet(), Recorder()
    engine(sweep, fleet, jobs=2, watch=watch).run()
    known = [(i * 0.2, left) for i, left in enumerate(watch.lefts) if left is not None]
    assert known[0][0] < 4  # by the speed of what runs
    for time, left in known:
        assert left == pytest.approx(30 - time, abs=3)


def test_runs_share_the_cores_and_take_turns_on_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "OMP_NUM_THREADS" not in environments(1)[0]  # the run measures what is fastest
    shared = environments(2, ["0", "1"])
    assert [place["OMP_NUM_THREADS"] for place in shared] == [str(max(1, cores() // 2))] * 2
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(3, ["4", "7"])] == ["4", "7", "4"]
    assert "FORCE_COLOR" not in shared[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environments(2)[0]["OMP_NUM_THREADS"] == "3"


def test_an_error_of_the_sweep_lets_its_runs_save(sweep):
    class Broken(Recorder):
        def ended(self, row, end, overview):
            raise OSError("no room")

    fleet = Fleet(seconds={"a_seed-1": 5.0})
    with pytest.raises(OSError, match="no room"):
        engine(sweep, fleet, jobs=2, watch=Broken()).run()
    assert [process.signals for process in fleet.running] == [[engine_module._STOP]]
