"""What `lightlm sweep` shows while it runs."""

import io
import re

from rich.console import Console

from lightlm.cli.displays.sweep import SweepDisplay
from lightlm.sweep.cells import Cell, Contestant
from lightlm.sweep.engine import Overview, Row
from lightlm.sweep.folder import End

ROWS = [
    Row(Cell(Contestant("lr=1e-3", "demo"), 1), "done", 1.0, 3.25, 61.0),
    Row(Cell(Contestant("lr=3e-3", "demo"), 1), "running", 0.4, None, 24.0, left=36.0),
    Row(Cell(Contestant("lr=[x]", "demo"), 1), "waiting"),
]
OVERVIEW = Overview(ROWS, left=7200.0)


def shown(terminal, *events):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=90, height=40, _environ={"TERM": "xterm"})
    with SweepDisplay(console) as display:
        for name, *arguments in events:
            display._shown = 0.0  # long ago
            getattr(display, name)(*arguments)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_terminal_shows_every_run():
    text = shown(True, ("progress", OVERVIEW))
    assert "1 waiting, 1 running, 1 done; about 2.0 h left" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "_seed-" in line}
    assert rows["lr-1e-3_seed-1"] == ["done", "3.2500", "61", "s", "-"]
    assert rows["lr-3e-3_seed-1"] == ["running", "40%", "-", "24", "s", "36", "s"]


def test_a_log_has_a_line_for_each_start_and_end_and_one_now_and_then():
    ended = ("ended", ROWS[0], End("failed", 61.0, "no [room]"), OVERVIEW)
    text = shown(False, ("started", ROWS[1], OVERVIEW), ("progress", OVERVIEW), ended, ("note", "look"))
    assert text.splitlines() == [
        "lr-3e-3_seed-1: started, resumed at 40%",
        "1 waiting, 1 running, 1 done; about 2.0 h left: lr-3e-3_seed-1 40%",
        "1/3  lr-1e-3_seed-1: failed, 61 s; about 2.0 h left",
        "  no [room]",
        "Note: look",
    ]


def test_many_runs_fit_a_screen_and_what_runs_is_among_them():
    rows = [Row(Cell(Contestant(f"n={n}", "demo"), 1), "done", 1.0, 3.0, 1.0) for n in range(60)]
    rows.append(Row(Cell(Contestant("last", "demo"), 1), "running"))
    text = shown(True, ("progress", Overview(rows, None)))
    assert "last_seed-1" in text
    assert "n-5_seed-1" in text
    assert "n-50_seed-1" not in text
