"""Names and folders of runs: claimed once, taken over, replaced, removed."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightlm import files
from lightlm.errors import CheckpointError, UsageError
from lightlm.runs import (
    RunLockedError,
    checkpoints,
    claim_folder,
    find_run,
    locked,
    mark_latest,
    new_run,
    remove_run,
)
from lightlm.runs.listing import mend_latest


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(name):
    path = Path("runs") / name
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("train: {tokens: 10}")
    return path


def test_starts_at_the_same_time_get_folders_of_their_own():
    (Path("runs/demo")).mkdir(parents=True)
    (Path("runs/demo/.recipe.yaml.partial")).write_text("left by a kill")
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(claim_folder, ["demo"] * 16))
    assert {path.name for path in claimed} == {f"demo-{number}" for number in range(2, 18)}


def test_a_folder_of_runs_that_cannot_be_made_is_one_message():
    os.symlink("unmounted", "runs", target_is_directory=True)
    for exact in (False, True):
        with pytest.raises(CheckpointError, match=r"runs leads to nothing \(is its disk mounted\?\)"):
            new_run("demo", exact=exact).__enter__()
    Path("runs").unlink()
    Path("runs").write_text("mine")
    with pytest.raises(CheckpointError, match="runs is not a folder"):
        claim_folder("demo")
    assert Path("runs").read_text() == "mine"


def test_a_copy_of_the_newest_run_in_place_of_the_link_is_not_taken_for_it():
    run = make_run("demo")
    mark_latest(run)
    shutil.copytree("runs", "copied")  # follows links, as scp -r
    shutil.rmtree("runs")
    os.rename("copied", "runs")
    for reference in (None, "latest", "runs/latest", Path("runs/latest").absolute()):
        with pytest.raises(CheckpointError, match=r"runs/latest is a copy of a run .*name one of these: demo$"):
            find_run(reference)
    mark_latest(find_run("demo"))
    assert find_run() == run
    assert (run / "recipe.yaml").is_file()


def test_processes_started_together_get_folders_of_their_own():
    start = "import sys; from lightlm.runs import new_run\nwith new_run('demo', exact=False) as run: "
    start += "(run / 'recipe.yaml').touch(); print(run.name)"
    starts = [subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate()[0].strip() for process in starts) == ["demo", "demo-2", "demo-3"]


def test_processes_that_name_one_run_do_not_share_it():
    """A folder that a killed start left goes to one of them."""
    Path("runs/mine").mkdir(parents=True)
    with new_run("mine", exact=True) as path:
        assert path == Path("runs/mine")
        with pytest.raises(RunLockedError, match="is being trained by"), new_run("mine", exact=True):
            pass
        (path / "recipe.yaml").touch()
    with pytest.raises(CheckpointError, match=r"runs/mine exists already; .*--resume .*--overwrite"):
        new_run("mine", exact=True).__enter__()


def test_a_folder_in_which_no_run_began_is_removed():
    with pytest.raises(ZeroDivisionError), new_run("early", exact=False):
        raise ZeroDivisionError
    assert list(Path("runs").iterdir()) == []


def test_a_folder_with_other_files_is_never_used():
    Path("runs/notes").mkdir(parents=True)
    Path("runs/notes/todo.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="not a run"):
            new_run("notes", exact=True, overwrite=overwrite).__enter__()
    assert [path.name for path in Path("runs/notes").iterdir()] == ["todo.txt"]


def test_overwriting_replaces_the_run_unless_it_is_trained():
    run = make_run("old")
    (run / "samples").mkdir()
    with locked(run), pytest.raises(RunLockedError), new_run("old", exact=True, overwrite=True):
        pass
    assert (run / "samples").is_dir()
    with new_run("old", exact=True, overwrite=True) as path:
        assert not [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        (path / "recipe.yaml").touch()
    assert [path.name for path in Path("runs").iterdir()] == ["old"]


def test_a_run_that_the_shell_stands_in_is_not_replaced(tmp_path, monkeypatch):
    run = tmp_path / "elsewhere" / "demo"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: demo\n", encoding="utf-8")
    monkeypatch.chdir(run)
    overwriting = new_run("demo", exact=True, overwrite=True, parent=run.parent)
    with pytest.raises(UsageError, match="demo is or holds the working directory"), overwriting:
        pass
    assert (run / "recipe.yaml").is_file()


def test_removing_a_link_keeps_what_it_leads_to(tmp_path):
    run = make_run("real")
    shutil.move(run, tmp_path / "elsewhere")
    Path("runs/linked").symlink_to(tmp_path / "elsewhere")
    remove_run(Path("runs/linked"))
    assert not os.path.lexists("runs/linked")
    assert (tmp_path / "elsewhere/recipe.yaml").is_file()


def test_a_run_that_is_trained_is_not_removed():
    run = make_run("busy")
    with locked(run), pytest.raises(RunLockedError):
        remove_run(run)
    remove_run(run)
    assert list(Path("runs").iterdir()) == []


def test_latest_is_mended_to_the_newest_run_left():
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        run = make_run(name)
        stamp = run.stat().st_mtime - age
        os.utime(run / "recipe.yaml", (stamp, stamp))
    mark_latest(Path("runs/c"))
    assert mend_latest() is None
    remove_run(Path("runs/c"))
    assert mend_latest() == Path("runs/b") == find_run()
    for name in "ab":
        remove_run(Path("runs") / name)
    assert mend_latest() is None
    assert list(Path("runs").iterdir()) == []


def test_latest_may_point_to_a_link(tmp_path):
    shutil.move(make_run("real"), tmp_path / "elsewhere")
    Path("runs/linked").symlink_to(tmp_path / "elsewhere")
    mark_latest(Path("runs/linked"))
    assert files.follow(Path("runs/latest")) == Path("runs/linked")


def test_a_copy_that_followed_links_is_a_run():
    """`scp -r` and zip files turn `latest` into a folder."""
    run = make_run("copied")
    for name in ("step_000010", "latest"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "complete.json").write_text("{}")
    files.point_to(run / "checkpoints/latest", "step_000010")
    assert files.follow(run / "checkpoints/latest") == run / "checkpoints/step_000010"
    assert (run / "checkpoints/latest.copied/complete.json").is_file()
    assert [path.name for path in checkpoints(run)] == ["step_000010"]
