"""Trackers and metrics. Nothing here reaches a network; trackio's data base goes to a temporary folder."""

import importlib
import json
import os
import re
import shutil
import sqlite3
import struct
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load_file

from lightlm import checkpoint
from lightlm.errors import RecipeError
from lightlm.recipe import TrackingSection, load_recipe
from lightlm.runs import RUNS
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.observe.metrics import MEASURED, read_metrics
from lightlm.train.observe.observers import Observers
from lightlm.train.observe.trackers import BACKENDS, Session, Trackers, Trackio, _installed
from tests.train.watch import Recorder, comparable, make_trainer

# trackio reads it once, when it is first imported.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="lightlm-trackio-")
DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="module", autouse=True)
def _no_trackio_left():
    yield
    shutil.rmtree(os.environ.pop("TRACKIO_DIR"), ignore_errors=True)


@pytest.fixture(scope="module")
def plain_run(workspace):
    """An uninterrupted run without trackers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return go("untracked")


def go(name, *backends, terminate_at=None, overrides=()):
    """A run as `lightlm train` starts it, new or resumed."""
    watch = Recorder(terminate_at)
    changes = [f"tracking.backends=[{', '.join(backends)}]", "eval.prompts=[The <old>]", *overrides]
    if (RUNS / name).exists():
        recipe, run, saved = reopen_run(name, changes)
    else:
        recipe, run, saved = load_recipe("tiny.yaml", changes), name, None
    trackers = Trackers(recipe.tracking, watch.note)
    trainer = make_trainer(recipe, run, Observers(watch, trackers), lambda *_: " & more", saved)
    with trackers:
        return trainer.train(), watch


def go_and_repeat_steps(name, *backends):
    """A run whose last checkpoint is lost: stopped after 13 steps, resumed from 10."""
    stopped, _ = go(name, *backends, terminate_at=13)
    shutil.rmtree(checkpoint.newest_checkpoint(stopped.run))
    assert checkpoint.newest_checkpoint(stopped.run).name == "step_000010"
    return go(name, *backends)


def numbers(metrics):
    return {key: value for key, value in metrics.items() if key != "step"}


def test_the_times_of_a_step_fit_together(plain_run):
    _, watch = plain_run
    for m in watch.metrics:
        assert 0 < m["data_seconds"] < m["step_seconds"]
        assert m["tokens_per_second"] == pytest.approx(256 / m["step_seconds"])
    assert watch.metrics[-1]["seconds"] == pytest.approx(sum(m["step_seconds"] for m in watch.metrics))


def test_data_seconds_is_the_wait_for_batches():
    watch = Recorder()
    trainer = make_trainer(load_recipe("tiny.yaml", ["train.tokens=512"]), "slow", watch)
    plain = trainer.setup.loader.batch

    def slow(start, count):
        time.sleep(0.01)
        return plain(start, count)

    trainer.setup.loader.batch = slow
    trainer.train()
    assert trainer.facts()["accumulation"] == 4
    assert all(m["data_seconds"] > 0.04 for m in watch.metrics)


def test_memory_is_the_peak_of_the_process(plain_run):
    psutil = pytest.importorskip("psutil")
    now = psutil.Process().memory_info().rss
    _, watch = plain_run
    readings = [m["memory"] for m in watch.metrics]
    assert readings == pytest.approx(sorted(readings), rel=1e-3)  # Linux counts pages per core, and sums late
    assert now / 4 < readings[-1] < 4 * now


def test_every_metric_is_documented(plain_run):
    table = re.findall(r"^\| `(\S+?)`", (DOCS / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    written = {key for m in plain_run[1].metrics for key in m}
    assert written <= set(table)
    assert {*MEASURED, "spike", "skipped", "eval/<task>/<metric>"} <= set(table)


def test_tensorboard_holds_every_step_once(plain_run):
    pytest.importorskip("tensorboard", reason="needs the extra [tracking]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, watch = go_and_repeat_steps("tensorboard", "tensorboard")
    assert watch.notes == ["tensorboard: tensorboard --logdir runs"]
    events = EventAccumulator(str(result.run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    # Trackers get no `resumed`: it belongs to the file.
    metrics = [{key: value for key, value in m.items() if key != "resumed"} for m in read_metrics(result.run)]
    for key in set().union(*(numbers(m) for m in metrics)):
        expected = [(m["step"], pytest.approx(m[key], rel=1e-6)) for m in metrics if key in m]
        assert [(event.step, event.value) for event in events.Scalars(key)] == expected, key
    assert set(events.Tags()["scalars"]) == set().union(*(numbers(m) for m in metrics))
    texts = {
        tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }
    assert "num_layers: 2" in texts["recipe/text_summary"][0]
    assert "The <old> & more" in texts["sample/text_summary"][-1]
    assert comparable(metrics) == comparable(plain_run[1].metrics)


@pytest.mark.parametrize("backend", ["tensorboard", "trackio", "wandb"])
def test_the_loss_of_the_model_that_a_run_starts_from_is_step_zero(backend, plain_run):
    pytest.importorskip(backend, reason="needs the extra [tracking]")
    overrides = ["train.init_from=untracked", "train.tokens=512"]
    result, watch = go(f"further-{backend}", backend, overrides=overrides)
    first = read_metrics(result.run)[0]
    assert first == watch.metrics[0]
    if backend == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(result.run / "tensorboard")).Reload()
        logged = [(event.step, event.value) for event in events.Scalars("val_loss")]
        assert logged[0] == (0, pytest.approx(first["val_loss"], rel=1e-6))
    elif backend == "trackio":
        with sqlite3.connect(Path(os.environ["TRACKIO_DIR"], "lightlm.db")) as base:
            rows = base.execute("select step, metrics from metrics where run_name like 'further-%' order by id")
            step, text = rows.fetchone()
        assert (step, json.loads(text)["val_loss"]) == (0, first["val_loss"])
    else:
        importlib.import_module("wandb").teardown()  # wandb's process has written all
        (file,) = (result.run / "wandb").glob("offline-run-*/*.wandb")
        assert next(row["val_loss"] for row in history(file) if row["_step"] == 0) == first["val_loss"]


def test_trackio_holds_every_step_once(plain_run, capsys):
    pytest.importorskip("trackio", reason="needs the extra [tracking]")
    go("other", "trackio", overrides=["tracking.project=once", "train.tokens=256"])
    result, watch = go_and_repeat_steps("trackio", "trackio")
    name = json.loads((result.run / "tracking.json").read_text())["trackio"]
    assert watch.notes == [f"trackio: {name}, trackio show --project lightlm"]
    assert capsys.readouterr().out == ""  # where `--json` puts its one document
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"], "lightlm.db")) as base:
        rows = base.execute("select run_id, step, metrics from metrics where run_name = ? order by id", [name])
        logged = [(run, step, json.loads(text)) for run, step, text in rows.fetchall()]
        [config] = base.execute("select config from configs where run_name = ?", [name]).fetchall()
    assert len({run for run, _, _ in logged}) == 1
    scalars = [(step, values) for _, step, values in logged if "loss" in values]
    metrics = read_metrics(result.run)
    assert [step for step, _ in scalars] == [m["step"] for m in metrics] == list(range(1, 21))
    assert comparable(v for _, v in scalars) == comparable(numbers(m) for m in metrics)
    assert json.loads(config[0])["model"]["vocab_size"] == 320
    assert [step for _, step, values in logged if "sample" in values] == [10, 20]
    assert comparable(metrics) == comparable(plain_run[1].metrics)


def test_a_new_run_never_continues_another_of_its_name():
    pytest.importorskip("trackio", reason="needs the extra [tracking]")
    short = ["tracking.project=twins", "train.tokens=256"]
    for _ in range(2):
        shutil.rmtree(go("twin", "trackio", overrides=short)[0].run)
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"], "twins.db")) as base:
        assert len(set(base.execute("select run_id from metrics where run_name like 'twin-____'"))) == 2


def test_a_resumed_run_continues_its_own_of_several_of_its_name():
    pytest.importorskip("trackio", reason="needs the extra [tracking]")
    session = Session(Path("one/demo"), {}, "threes", None, 0, 0)
    first = Trackio(session)
    first.log(1, {"loss": 3.0})
    first.finish(failed=False)
    other = Trackio(replace(session, run=Path("two/demo")))
    other.log(1, {"loss": 2.0})
    other.finish(failed=False)
    renamed = Trackio(replace(session, run=Path("one/renamed"), known=first.id, first_step=1, logged_step=1))
    renamed.log(2, {"loss": 1.0})
    renamed.finish(failed=False)
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"], "threes.db")) as base:
        found = base.execute("select run_id, step from metrics order by id").fetchall()
    assert [step for _, step in found] == [1, 1, 2]
    assert found[0][0] == found[2][0] != found[1][0]


def test_wandb_offline_keeps_its_files_in_the_run_and_every_step_once(plain_run):
    wandb = pytest.importorskip("wandb", reason="needs the extra [tracking]")
    result, watch = go_and_repeat_steps("wandb", "wandb")
    assert watch.notes == ["wandb: offline; wandb sync --append runs/wandb/wandb/offline-run-*"]
    assert not Path("wandb").exists()
    name = json.loads((result.run / "tracking.json").read_text())["wandb"]
    files = sorted((result.run / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    logged = [row for file in files for row in history(file)]
    metrics = read_metrics(result.run)
    assert [row["_step"] for row in logged] == [m["step"] for m in metrics]
    for row, m in zip(logged, metrics, strict=True):
        assert {key: row[key] for key in m.keys() - MEASURED - {"step"}} == numbers(*comparable([m]))
    wandb.teardown()
    assert comparable(metrics) == comparable(plain_run[1].metrics)


def history(file):
    """The rows in a .wandb file, which is a LevelDB log: 7 bytes of its own, then records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:  # no room for a record's header
            position += 32768 - position % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class Broken:
    """A backend that fails at a chosen call."""

    package, id, where, sent = "json", "broken", "nowhere", 0

    def __init__(self, when):
        self.when, self.calls = when, []

    def __call__(self, session):
        self.fail("open")
        return self

    def fail(self, what):
        self.calls.append(what)
        if what == self.when:
            raise ConnectionError("no route to host\nand more")

    def log(self, step, metrics):
        self.fail(f"log {step}")

    def sample(self, step, prompt, text):
        self.fail("sample")

    def flush(self):
        self.fail("flush")

    def finish(self, failed):
        self.fail(f"finish {failed}")


@pytest.mark.parametrize("when", ["open", "log 3", "sample", "flush", "finish False"])
def test_a_tracker_that_fails_is_noted_once_and_training_continues(plain_run, monkeypatch, when):
    broken = Broken(when)
    monkeypatch.setitem(BACKENDS, "tensorboard", broken)
    result, watch = go(f"broken-{when.replace(' ', '-')}", "tensorboard")
    assert [note for note in watch.notes if "failed" in note] == [
        "tensorboard failed and is dropped (ConnectionError: no route to host)"
    ]
    assert broken.calls.count(when) == 1
    assert broken.calls[-1] == when
    assert comparable(watch.metrics) == comparable(plain_run[1].metrics)
    ours, other = (load_file(checkpoint.newest_checkpoint(r.run) / "model.safetensors") for r in (result, plain_run[0]))
    assert all((ours[key] == other[key]).all() for key in other)


def test_a_step_with_a_checkpoint_is_stored_too(monkeypatch):
    """It is saved before its metrics are complete, and a run that resumes from it does not log it again."""
    monkeypatch.setitem(BACKENDS, "tensorboard", backend := Broken("never"))
    go("stored", "tensorboard", terminate_at=13)
    for step in (10, 13):
        after = backend.calls[backend.calls.index(f"log {step}") + 1 :]
        assert after[0] == "flush"


def test_a_run_killed_twice_sends_no_step_again(monkeypatch):
    """The second time before it was as far as the first: the metrics file, cut by then, does not know."""
    sessions = []

    def opened(session):
        sessions.append((session.first_step, session.logged_step))
        return Broken("never")

    opened.package = "json"
    monkeypatch.setitem(BACKENDS, "tensorboard", opened)
    for last_step in (13, 11, None):
        result, _ = go("twice", "tensorboard", terminate_at=last_step)
        if last_step:
            shutil.rmtree(checkpoint.newest_checkpoint(result.run))
    assert sessions == [(0, 0), (10, 13), (10, 13)]


def test_a_run_that_fails_is_finished_as_failed(monkeypatch):
    broken = Broken("never")
    monkeypatch.setitem(BACKENDS, "tensorboard", broken)

    def fail(self, metrics):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        go("interrupted", "tensorboard")
    assert broken.calls[-1] == "finish True"


def test_a_missing_package_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RecipeError, match=r'trackio cannot be imported here; .*--editable "\.\[tracking\]"'):
        Trackers(TrackingSection(backends=["trackio"]), print)


def test_a_recipe_may_name_every_backend():
    assert TrackingSection(backends=list(BACKENDS)).backends == list(BACKENDS)
    [names] = get_args(TrackingSection.model_fields["backends"].annotation)
    assert set(get_args(names)) == BACKENDS.keys()


def test_a_folder_of_old_runs_is_no_package(tmp_path, monkeypatch):
    """`./wandb`, which wandb itself leaves in the current directory."""
    (tmp_path / "old_runs_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not _installed("old_runs_folder")
    assert _installed("json")
