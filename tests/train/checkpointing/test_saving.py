import errno
import json
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightlm import checkpoint, files
from lightlm.errors import CheckpointError
from lightlm.recipe import load_recipe, load_run_recipe
from lightlm.recipe.sections.checkpoint import CheckpointSection
from lightlm.train.checkpointing import saving
from lightlm.train.checkpointing.resume import reopen_run
from lightlm.train.checkpointing.saving import Saver, tidy
from lightlm.train.setup import open_data, set_up
from tests.shapes import build
from tests.train.checkpointing.kills import differences
from tests.train.watch import Recorder, resume, start

FILES = ["model.safetensors", "config.json", "tokenizer.json", "training_state.pt", "complete.json"]
SHORT = ("tiny.yaml", "train.tokens=3072", "eval.every=0")  # 12 steps, saved after 5 and 10


@pytest.fixture(autouse=True)
def _in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def whole(workspace):
    """An uninterrupted run that saved in the foreground."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return start(*SHORT, "checkpoint.asynchronous=false", "checkpoint.keep_last=9", name="saved-whole")[0].run


@pytest.fixture(scope="module")
def stopped(workspace):
    """A run interrupted after step 10: it has step_000005 and step_000010."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return start(*SHORT, "checkpoint.keep_last=9", name="saved-stopped", watch=Recorder(terminate_at=10))[0].run


@pytest.fixture
def copied(stopped):
    """`stopped` to be damaged."""
    run = Path("runs/copied")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stopped, run, symlinks=True)
    return run


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def tear(path, seed):
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(len(content))])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [tear, flip, lambda path, _: path.unlink()], ids=["torn", "flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(copied, name, damage):
    damage(copied / "checkpoints/step_000010" / name, 83)
    warnings = []
    _, run, found = reopen_run("copied", [], warnings.append)
    assert found == run / "checkpoints/step_000005"
    if (copied / "checkpoints/step_000010/complete.json").exists():  # else there is no second checkpoint
        (warning,) = warnings
        assert f"step_000010/{name} is damaged" in warning
        assert warning.endswith("step_000005 is used instead")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), bit=st.integers(0, 10**7))
def test_no_flipped_bit_goes_unseen(stopped, name, bit):
    path = stopped / "checkpoints/step_000010" / name
    content = path.read_bytes()
    try:
        flip(path, bit)
        assert reopen_run("saved-stopped", [], lambda _: None)[2].name == "step_000005"
    finally:
        path.write_bytes(content)


def test_the_run_writes_a_damaged_step_again_and_ends_the_same(copied, whole):
    tear(copied / "checkpoints/step_000010/training_state.pt", 1)
    result, watch = resume("copied")
    assert watch.facts["first_step"] == 5
    assert "training_state.pt is damaged" in watch.notes[0]
    assert watch.notes[1].endswith("step_000010 is renamed to step_000010.damaged")
    assert watch.saved == ["step_000010", "step_000012"]
    assert names(copied) == ["latest", "step_000005", "step_000010", "step_000010.damaged", "step_000012"]
    shutil.rmtree(copied / "checkpoints/step_000010.damaged")
    assert differences(result.run, whole) == []


@pytest.mark.parametrize("pruned", [False, True])
def test_a_run_resumes_after_a_copy_that_follows_links(stopped, workspace, pruned):
    run = Path("runs/followed")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(stopped, run, symlinks=True)
    checkpoint.mark_best(run / "checkpoints/step_000005")
    shutil.copytree(run, "moved")  # as scp -r
    shutil.rmtree(run)
    shutil.move("moved", run)
    if pruned:
        shutil.rmtree(run / "checkpoints/step_000005")
    resume("followed")
    best = checkpoint.best_checkpoint(run)
    assert best == (None if pruned else run / "checkpoints/step_000005")
    assert (run / "checkpoints/best.copied/model.safetensors").is_file()
    assert (run / "checkpoints/step_000012").is_dir()


def test_a_state_that_cannot_be_read_is_passed_over(copied):
    """Its checksum is right: it was written like this."""
    folder = copied / "checkpoints/step_000010"
    (folder / "training_state.pt").write_bytes(b"no archive")
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"]["training_state.pt"] = {
        "bytes": 10,
        "xxh3": files.checksum(folder / "training_state.pt"),
    }
    (folder / "complete.json").write_text(json.dumps(marker))
    warnings = []
    assert reopen_run("copied", [], warnings.append)[2].name == "step_000005"
    assert "training_state.pt cannot be read" in warnings[0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files are mapped")
def test_a_resumed_run_holds_no_checkpoint_open(copied):
    """Windows cannot delete a file that is mapped into memory."""
    recipe, data = load_run_recipe(copied), open_data(load_run_recipe(copied))
    setup = set_up(recipe, data, lambda note: None, resume_from=copied / "checkpoints/step_000010")
    assert "step_000010" not in Path("/proc/self/maps").read_text()
    assert setup.progress.step == 10


def test_a_checkpoint_that_cannot_be_deleted_is_noted_and_the_others_are_deleted(copied, monkeypatch):
    remove = files.remove_folder

    def removing(path):
        if path.name == "step_000005":
            raise PermissionError(13, "Permission denied", str(path))
        remove(path)

    monkeypatch.setattr(files, "remove_folder", removing)
    shutil.copytree(copied / "checkpoints/step_000010", copied / "checkpoints/step_000011")
    [problem] = saving.prune(copied, 1)
    assert "could not be deleted" in problem
    assert "step_000005" in problem
    assert names(copied) == ["latest", "step_000005", "step_000011"]
    watch = Recorder()
    with Saver(copied, CheckpointSection(keep_last=1), None, build("llama").config, watch) as saver:
        saver.save(11, {}, {}, best=True)  # it is saved already
    assert watch.notes == [problem]


def test_if_all_are_damaged_nothing_is_lost_or_begun_anew(copied):
    for step in ("step_000005", "step_000010"):
        tear(copied / "checkpoints" / step / "model.safetensors", 2)
    with pytest.raises(CheckpointError, match="all 2 checkpoints of runs/copied are damaged") as error:
        resume("copied")
    assert "\n" not in str(error.value)
    assert names(copied) == ["latest", "step_000005", "step_000010"]


def test_looking_at_a_damaged_run_changes_nothing(copied):
    tear(copied / "checkpoints/step_000010/config.json", 3)
    before = names(copied)
    reopen_run("copied", [], lambda _: None)
    assert names(copied) == before


class Gate:
    """Holds the writer of one step's checkpoint until it is opened."""

    def __init__(self, monkeypatch, step):
        self.event, self.step, self._write = threading.Event(), step, checkpoint.write_checkpoint
        monkeypatch.setattr(checkpoint, "write_checkpoint", self._held)

    def _held(self, run, step, *args, **kwargs):
        assert step != self.step or self.event.wait(120)
        return self._write(run, step, *args, **kwargs)


def test_training_goes_on_while_a_checkpoint_is_written(whole, monkeypatch):
    """The writer is held for three more steps: what it then writes is still the state after step 5."""
    gate, seen = Gate(monkeypatch, 5), []

    class Watch(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics["step"] == 8:
                seen.append(list(self.saved))
                gate.event.set()

    result, watch = start(*SHORT, "checkpoint.keep_last=9", name="background", watch=Watch())
    assert seen == [[]]
    assert watch.saved == ["step_000005", "step_000010", "step_000012"]
    assert differences(result.run, whole) == []


def test_sigterm_in_the_middle_of_a_save_keeps_that_one_and_adds_its_own(whole, monkeypatch):
    gate = Gate(monkeypatch, 5)

    class Watch(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics["step"] == 7:
                threading.Timer(0.2, gate.event.set).start()

    result, watch = start(*SHORT, "checkpoint.keep_last=9", name="term-in-save", watch=Watch(terminate_at=7))
    assert result.interrupted
    assert watch.saved == ["step_000005", "step_000007"]
    result, _ = resume("term-in-save")
    shutil.rmtree(result.run / "checkpoints/step_000007")
    assert differences(result.run, whole) == []


def test_a_second_save_waits_for_the_first_and_says_so_if_it_takes_long(monkeypatch):
    monkeypatch.setattr(saving, "_LONG_WAIT", 0.1)
    gate = Gate(monkeypatch, 5)

    class Watch(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics["step"] == 9:  # the save of step 10 comes before its metrics
                threading.Timer(0.3, gate.event.set).start()

    _, watch = start(*SHORT, name="impatient", watch=Watch())
    assert watch.saved == ["step_000005", "step_000010", "step_000012"]
    (note,) = watch.notes
    assert "for the checkpoint of step 5 to be written; a higher checkpoint.every" in note


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("failing", ["torch", "system"])
def test_a_full_disk_is_one_error_and_leaves_the_checkpoint_before(whole, monkeypatch, asynchronous, failing):
    """torch reports the system's error in words of its own."""
    full = RuntimeError("file write failed") if failing == "torch" else OSError(errno.ENOSPC, "No space left on device")
    plain, name = torch.save, f"full-{asynchronous}-{failing}"

    def save(state, path):
        if state["progress"]["step"] == 10:
            path.write_bytes(b"half of it")
            raise full
        plain(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        watch = Recorder()
        with pytest.raises(
            CheckpointError, match=r"checkpoint of step 10 could not be written.*one is step_000005.*--resume"
        ):
            start(*SHORT, f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep_last=9", name=name, watch=watch)
    run = Path("runs") / name
    assert names(run) == ["latest", "step_000005"]
    resume(name)
    assert differences(run, whole) == []


def test_a_run_that_is_moved_while_it_trains_stops_and_resumes_where_it_is(whole):
    class Watch(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics["step"] == 7:
                Path("runs/old").rename("runs/new")

    with pytest.raises(CheckpointError, match=r"runs/old was moved or deleted .* step 10 is in runs/old/checkpoints/"):
        start(*SHORT, "checkpoint.keep_last=9", name="old", watch=Watch())
    assert names(Path("runs/old")) == ["latest", "step_000010"]
    result, _ = resume("new")
    assert differences(result.run, whole) == []


def test_a_failure_of_training_comes_before_one_of_the_writer(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    watch, model = Recorder(), build("llama")
    settings = load_recipe("tiny.yaml").checkpoint
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, settings, None, model.config, watch) as saver:  # noqa: PT012
        saver.save(1, model.state_dict(), {})
        raise ZeroDivisionError
    assert "the disk is full" in watch.notes[0]


def test_keep_last_and_keep_every_combine():
    recipe = ("tiny.yaml", "train.tokens=3072", "eval.every=0", "checkpoint.every=512", "checkpoint.keep_every=1280")
    result, watch = start(*recipe, name="kept")
    assert watch.saved == [f"step_{step:06d}" for step in (2, 4, 5, 6, 8, 10, 12)]
    assert names(result.run) == ["latest", "step_000005", "step_000010", "step_000012"]
    resume("kept", "train.tokens=4352")
    assert names(result.run)[1:] == [f"step_{step:06d}" for step in (5, 10, 15, 16, 17)]


def test_what_a_kill_left_is_cleared_in_this_run_alone(copied, stopped):
    checkpoints, other = copied / "checkpoints", stopped / "checkpoints/.step_000099.partial"
    for folder in (".step_000012.partial", ".step_000001.deleted", ".step_000010.old"):
        (checkpoints / folder).mkdir()
        (checkpoints / folder / "config.json").write_text("{}")
    (checkpoints / ".latest.partial").symlink_to("step_000010")
    (checkpoints / "step_000005").rename(checkpoints / ".step_000005.old")  # between the two renames of a replacement
    (checkpoints / "latest").unlink()
    other.mkdir()
    tidy(copied, checkpoints / "step_000010", Recorder())
    assert names(copied) == ["latest", "step_000005", "step_000010"]
    assert (checkpoints / "latest").resolve().name == "step_000010"
    assert other.is_dir()
    other.rmdir()
