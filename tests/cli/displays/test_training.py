"""What training shows, in a terminal (a pseudo-terminal here) and in a plain log."""

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from lightlm.cli.displays import training as training_display
from lightlm.cli.displays.training import TrainingDisplay
from tests.corpus import make_workspace

needs_terminal = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
FACTS = {
    "run": "runs/demo", "parameters": 6_800_000, "active_parameters": 6_800_000, "flops_per_token": 40_000_000,
    "device": "cpu", "dtype": "bfloat16", "first_step": 0,
    "tokens": 4_096_000, "epochs": 1.0, "data": "data/pydocs", "steps": 1000, "batch_tokens": 4096,
    "accumulation": 1, "micro_batch": 16, "processes": 1, "first_batch_tokens": 4096,
}  # fmt: skip


def metrics(step, **more):
    return {
        "step": step, "tokens": 4096 * step, "loss": 5.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 8192.0,
        "seconds": step / 2, "step_seconds": 0.5, "data_seconds": 0.01, "memory": 3 * 2**30, **more,
    }  # fmt: skip


def show(display):
    """A short run with everything that can happen."""
    display.start(FACTS)
    for step in range(1, 11):
        display.step(metrics(step))
    display.sample(10, "The old", " sea \x1b[2J\r[/b] :smile: naïve")
    display.step(metrics(11, val_loss=4.5, val_bpb=1.8, **{"eval/hellaswag/acc_norm": 0.2875}))
    display.note("spike at step 12: loss 9")
    display.step(metrics(1000, spike=True))


def test_the_first_step_after_a_resume_shows_its_own_speed():
    stream = io.StringIO()
    with TrainingDisplay(Console(file=stream, width=200, highlight=False)) as display:
        display.start(FACTS | {"first_step": 100})
        display.step(metrics(101))
    assert "tokens/s 8,192" in stream.getvalue()


def plain(width=80, **options):
    stream = io.StringIO()
    with TrainingDisplay(Console(file=stream, width=width, highlight=False, **options)) as display:
        show(display)
    return stream.getvalue()


@contextlib.contextmanager
def terminal():
    """A pseudo-terminal: the end to write to, and what has arrived at the other once the block has ended."""
    import pty

    ours, theirs = pty.openpty()
    received = bytearray()

    def read():
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while block := os.read(ours, 4096):
                received.extend(block)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield theirs, received
    finally:
        with contextlib.suppress(OSError):
            os.close(theirs)
        reader.join(10)
        os.close(ours)


def in_terminal(width=120, shown=show, encoding="utf-8", **environment):
    with terminal() as (end, received):
        file = os.fdopen(end, "w", encoding=encoding)
        console = Console(file=file, width=width, highlight=False, _environ={"TERM": "xterm-256color", **environment})
        with TrainingDisplay(console) as display:
            shown(display)
        file.close()
    return received.decode()


def experts(**more):
    return {
        "moe/violation": 0.25, "moe/violation_worst": 1.5, "moe/entropy": 0.9876, "moe/entropy_lowest": 0.9,
        "moe/dead_experts": 1, "moe/dropped": 0, **more,
    }  # fmt: skip


def show_experts(display):
    """A step with figures by layer, and one without."""
    display.start(FACTS | {"active_parameters": 2_500_000, "flops_per_token": 15_000_000})
    by_layer = {"moe/load": [[2, 2]] * 3, "moe/layer_violation": [0.0, 0.5, 1.5], "moe/bias_range": 0.0125}
    display.step(metrics(1, **experts(), **by_layer))
    display.step(metrics(1000, **experts()))


def test_a_plain_log_is_whole_lines_without_control_codes():
    text = plain()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    lines = text.splitlines()
    assert lines[0] == "runs/demo: 6.8M parameters on cpu, bfloat16"
    assert "sample: The old sea �[2J�[/b] :smile: naïve" in lines
    assert "step     11  loss 5.0000  validation 4.5000 (1.8000 bits per byte)" in lines
    assert "step     11  hellaswag/acc_norm 0.2875" in lines
    assert "Note: spike at step 12: loss 9" in lines
    [first] = [line for line in lines if line.startswith("step 1/1,000")]
    for part in ("loss 5.0000", "tokens/s 8,192", "memory 3.00 GiB", "data wait 2%", "elapsed 0:00", "left 8:19"):
        assert part in first
    assert lines[-1].startswith("step 1,000/1,000  loss 5.0000 spike  validation 4.5000")


def test_plain_lines_come_at_a_rhythm(monkeypatch):
    """Steps of half a second: one line in 10 s at first, one in 60 s after an hour."""
    clock = [0.0]
    monkeypatch.setattr(training_display.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with TrainingDisplay(Console(file=stream, width=300)) as display:
        display.start(FACTS | {"steps": 20_000})
        for step in range(1, 10_001):
            clock[0] = 1000 + step / 2
            display.step(metrics(step))
    shown = [int(found.replace(",", "")) / 2 for found in re.findall(r"^step ([\d,]+)/", stream.getvalue(), re.M)]
    gaps = [after - before for before, after in itertools.pairwise(shown)]
    assert shown[0] == 0.5
    assert gaps[0] == pytest.approx(10, abs=1)
    assert gaps[-1] == 60
    assert gaps == sorted(gaps)


def test_forced_colors_in_a_log_bring_no_cursor_movements():
    """FORCE_COLOR is usual in continuous integration; its log is not a terminal."""
    text = plain(force_terminal=True, color_system="standard")
    assert "\x1b[" in text
    assert "\r" not in text
    assert set(re.findall(r"\x1b\[[0-9;?]*([A-Za-z])", text)) == {"m"}


def show_phases(display):
    display.start(FACTS)
    display.step(metrics(1))
    display.phase("validating")
    display.phase("validating", 0.3)
    time.sleep(0.6)  # two refreshes
    display.phase("")


@needs_terminal
def test_a_terminal_names_what_runs_between_steps():
    assert re.search(r"[-|/\\] validating 30%", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", in_terminal(80, show_phases)))


def test_a_log_names_what_takes_long(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training_display.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with TrainingDisplay(Console(file=stream, width=80)) as display:
        for name, seconds in (("validating", 9), ("scoring hellaswag", 100)):
            display.phase(name)
            for second in range(seconds):
                clock[0] += 1
                display.phase(name, second / 100)
            display.phase("")
    assert stream.getvalue().splitlines() == ["scoring hellaswag 9%", "scoring hellaswag 69%"]


@needs_terminal
def test_a_terminal_shows_a_live_line_below_a_log():
    text = in_terminal()
    assert "\x1b[2K" in text  # a line wiped to be drawn again
    assert re.search(r"step +loss +validation +lr +grad norm", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert "1,000/1,000" in text
    assert "hellaswag/acc_norm 0.2875" in text
    assert "\x1b[2J" not in text  # the sample's own code
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


@needs_terminal
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_live_line_fits_the_terminal(width):
    rows = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row) for row in re.split(r"[\r\n]+", in_terminal(width))]
    live = [row for row in rows if re.match(r"\s*(\d[\d,]*)/1,000\s", row)]
    assert live
    assert all(len(row) <= width and "…" not in row for row in live)
    assert all("5.0000" in row for row in live)
    assert any("GiB" in row for row in live) == (width >= 120)


@needs_terminal
def test_no_color_is_obeyed_and_a_dumb_terminal_gets_plain_lines():
    colors = r"\x1b\[[0-9;]*3[0-7]m"
    assert re.search(colors, in_terminal())
    assert not re.search(colors, in_terminal(NO_COLOR="1"))
    dumb = in_terminal(TERM="dumb").replace("\r\n", "\n")  # the terminal driver's own
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", dumb)
    assert "step 1,000/1,000" in dumb


def test_a_log_of_experts_says_what_is_active_and_how_evenly_they_are_used():
    stream = io.StringIO()
    with TrainingDisplay(Console(file=stream, width=80)) as display:
        show_experts(display)
    first, _, legend, *steps = stream.getvalue().splitlines()
    assert legend.startswith("Experts: imbalance is")
    assert first == "runs/demo: 6.8M parameters (2.5M active per token, 15M FLOPs) on cpu, bfloat16"
    assert len(steps) == 2
    for line in steps:  # the range of the bias is the last one known
        assert line.endswith(
            "imbalance 0.25  worst layer 1.50  entropy 0.988  dead experts 1  bias range 0.013  dropped 0"
        )


@needs_terminal
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_experts_have_a_second_live_line_that_fits_too(width):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", in_terminal(width, show_experts))
    live = [row for row in re.split(r"[\r\n]+", text) if re.search(r"0\.25|imbalance +worst", row)]
    assert live
    assert all(len(row) <= width and "…" not in row for row in live)
    assert all("1.50" in row for row in live if "0.25" in row)
    assert ("▁▅█" in text) == (width >= 60)
    assert ("dropped" in text) == (width >= 80)


@needs_terminal
def test_a_terminal_without_block_characters_gets_no_bars():
    text = in_terminal(120, show_experts, encoding="ascii")
    assert "1.50" in text
    assert "by layer" not in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("display"), 100)


def environment(**changes):
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return kept | {"TERM": "xterm-256color"} | changes


def test_the_command_writes_a_plain_log_to_a_pipe(folder):
    command = [sys.executable, "-m", "lightlm", "train", "tiny.yaml", "train.tokens=1280"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, check=True)
    for stream in (done.stdout, done.stderr):
        assert not re.search(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]" if os.name == "nt" else rb"[\x00-\x09\x0b-\x1f]", stream)
    assert b"\nstep 5/5  loss " in done.stderr


@needs_terminal
def test_the_command_draws_in_a_terminal_and_keeps_standard_output_clean(folder):
    command = [sys.executable, "-m", "lightlm", "train", "tiny.yaml", "train.tokens=1280", "--json"]
    with terminal() as (end, received):
        done = subprocess.run(command, cwd=folder, env=environment(COLUMNS="120"), stdout=subprocess.PIPE, stderr=end)
    assert done.returncode == 0
    assert done.stdout.startswith(b"{")
    assert b"\x1b" not in done.stdout
    assert b"\x1b[2K" in received
    assert b"5/5" in received


@pytest.mark.parametrize(("epochs", "shown"), [(0.413, "0.41 epochs"), (3.0, "3 epochs"), (347.2, "347 epochs")])
def test_epochs_are_a_plain_number(epochs, shown):
    stream = io.StringIO()
    with TrainingDisplay(Console(file=stream, width=200)) as display:
        display.start(FACTS | {"epochs": epochs})
    assert f"({shown} of data/pydocs)" in stream.getvalue()


def test_a_mixture_shows_tokens_epochs_and_losses_of_each_source():
    sources = [
        {"name": "web", "train_tokens": 10_000_000, "tokens": 3_000_000, "epochs": 0.3},
        {"name": "[poems]", "train_tokens": 100_000, "tokens": 1_096_000, "epochs": 10.96},
    ]
    stream = io.StringIO()
    with TrainingDisplay(Console(file=stream, width=300, highlight=False)) as display:
        display.start(FACTS | {"epochs": None, "data": "data/web, data/[poems]", "sources": sources})
        losses = {"val_loss": 4.5, "val_bpb": 1.8, "val_loss/web": 4.25, "val_loss/[poems]": 4.75}
        display.step(metrics(1, **{"tokens/web": 3000, "tokens/[poems]": 1096}, **losses))
    shown = stream.getvalue()
    assert "4.1M tokens of data/web, data/[poems] in 1,000 steps" in shown
    assert "web: 3M tokens, 0.3 epochs of 10M" in shown
    assert "[poems]: 1.1M tokens, 11 epochs of 100K" in shown
    assert "validation of web 4.2500  [poems] 4.7500" in shown
    assert "web 3K (0.0003 epochs)  [poems] 1.1K (0.011 epochs)" in shown
