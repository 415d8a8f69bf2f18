"""The lock of a run, held by real processes."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from lightlm.runs import RunLockedError, holder, locked, require_unlocked

HOLD = "import sys, pathlib; from lightlm.runs import locked\nwith locked(pathlib.Path(sys.argv[1])): print(); input()"


@contextlib.contextmanager
def process_that_holds(run):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_with_the_first_ones_number(tmp_path):
    with process_that_holds(tmp_path) as process:
        message = f"{tmp_path} is being trained by process {process.pid} on this machine"
        with pytest.raises(RunLockedError, match=message), locked(tmp_path):
            pass
        with pytest.raises(RunLockedError, match=message):
            require_unlocked(tmp_path)
        assert holder(tmp_path).pid == process.pid
        process.communicate("\n")
    require_unlocked(tmp_path)
    with locked(tmp_path):
        assert holder(tmp_path).pid == os.getpid()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_holds_nothing_whatever_it_left(tmp_path):
    with process_that_holds(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert str(process.pid) in (tmp_path / ".lock.json").read_text()
    assert holder(tmp_path) is None
    with locked(tmp_path):
        pass


def test_a_process_on_another_machine_is_named_with_it(tmp_path):
    with process_that_holds(tmp_path):
        (tmp_path / ".lock.json").write_text(json.dumps({"pid": 7, "host": "node12"}))
        with pytest.raises(RunLockedError, match="by process 7 on node12;"):
            require_unlocked(tmp_path)
        (tmp_path / ".lock.json").write_text("")
        with pytest.raises(RunLockedError, match="by another process;"):
            require_unlocked(tmp_path)


def test_looking_creates_nothing(tmp_path):
    assert holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, error):
    def unsupported(*args, **kwargs):
        raise error

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    with locked(tmp_path):
        assert "has no locks: make sure that no other process trains this run" in caplog.text
    assert holder(tmp_path) is None


def test_a_failure_inside_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(Path(tmp_path)):
        raise ZeroDivisionError
    assert holder(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
