"""Standard streams that cannot be written: the reader left, the disk is full, the terminal is closed."""

import json
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from lightlm.cli import console
from tests.corpus import make_workspace

pytestmark = pytest.mark.skipif(os.name == "nt", reason="/dev/full and pseudo-terminals")
SHORT = ["train", "tiny.yaml", "train.tokens=1280"]


def command(*arguments):
    return [sys.executable, "-m", "lightlm", *arguments]


def no_reader():
    """The end of a pipe that nobody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def closed_terminal():
    import pty

    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


@pytest.fixture
def full():
    with open("/dev/full", "w") as file:
        yield file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("streams"), 100)


@pytest.mark.parametrize(("end", "processes"), [(no_reader, "2"), (closed_terminal, "1")])
def test_training_goes_on_to_its_end(folder, end, processes):
    name, stream = end.__name__, end()
    arguments = command(*SHORT, "--name", name, "--nproc", processes)
    done = subprocess.run(
        arguments, cwd=folder, stdout=stream, stderr=stream, env=os.environ | {"TERM": "xterm-256color"}
    )
    os.close(stream)
    assert done.returncode == 0
    assert (folder / "runs" / name / "checkpoints/step_000005/complete.json").is_file()
    assert (folder / "runs" / name / "report.html").is_file()


@pytest.mark.parametrize(("reader", "code"), [(no_reader, 7), (lambda: os.open(os.devnull, os.O_WRONLY), 0)])
def test_a_command_knows_that_its_reader_left(reader, code):
    told = "guard_streams(); print(1, flush=True); raise SystemExit(7 if reader_left() else 0)"
    text = f"from lightlm.cli.console import guard_streams, reader_left; {told}"
    stream = reader()
    assert subprocess.run([sys.executable, "-c", text], stdout=stream).returncode == code
    os.close(stream)


def test_closed_streams_keep_their_numbers(folder):
    """Otherwise the next file that the command opens gets them, and what is printed lands in it."""
    shell = f'"{sys.executable}" -m lightlm train tiny.yaml train.tokens=1280 --name closed <&- >&- 2>/dev/full'
    assert subprocess.run(["sh", "-c", shell], cwd=folder).returncode == 0
    lines = (folder / "runs/closed/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_preparing_completes_where_nobody_reads(folder):
    arguments = ["prepare-data", "tiny.jsonl", "--tokenizer", "train:320", "--out", "data/unread", "--json"]
    stream = no_reader()
    done = subprocess.run(command(*arguments), cwd=folder, stdout=stream, stderr=stream)
    os.close(stream)
    assert done.returncode == 0
    assert (folder / "data/unread/manifest.json").is_file()


def test_results_that_a_full_disk_swallows_are_an_error_and_a_reader_that_left_is_not(full):
    done = subprocess.run(command("recipes", "show", "demo"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: standard output could not be written: No space left on device\n"
    stream = no_reader()
    done = subprocess.run(command("recipes", "keys"), stdout=stream, stderr=subprocess.PIPE, text=True)
    os.close(stream)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistake_keeps_its_exit_code_where_its_message_is_lost(full):
    assert subprocess.run(command("recipes", "show", "nothing"), stdout=full, stderr=full).returncode == 1
    assert subprocess.run(command("nothing"), stdout=full, stderr=full).returncode == 2


def test_a_pipe_that_another_program_made_non_blocking_gets_everything():
    ours, theirs = os.pipe()
    import fcntl

    fcntl.fcntl(theirs, fcntl.F_SETFL, os.O_NONBLOCK)
    code = "from lightlm.cli.console import guard_streams, out; guard_streams(); print('x' * 300_000, flush=True)"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=theirs)
    os.close(theirs)
    time.sleep(0.3)  # until the pipe is full
    with open(ours) as reader:
        assert len(reader.read()) == 300_001
    assert writer.wait(10) == 0


def test_json_is_utf8_whatever_the_locale():
    told = r"guard_streams(); print_json({'text': 'Ω 🙂', 'path': 'half \ud83d'})"
    code = f"from lightlm.cli.console import guard_streams, print_json; {told}"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, check=True)
    assert json.loads(done.stdout.decode()) == {"text": "Ω 🙂", "path": "half ?"}


def test_a_table_in_a_narrow_terminal_loses_nothing(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setattr(console, "out", Console())
    console.print_table([["a-run", "1,234,567", "3.1415"]], "run", "tokens", "loss", right=(1, 2), whole=(0,))
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a-run", "1,234,567", "3.1415"))


def test_texts_are_not_squeezed_into_slivers(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(console, "out", Console())
    console.print_table(
        [["two KV heads, cache 128", "1,234,567", "3.1415926535897932"]], "", "tokens", "loss", right=(1, 2)
    )
    assert "two KV heads," in capsys.readouterr().out


def test_json_that_could_not_be_written_is_noted(folder, full):
    done = subprocess.run(
        command(*SHORT, "--name", "lost", "--json"), cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0
    assert "Note: standard output could not be written: No space left" in done.stderr
