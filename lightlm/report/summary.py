"""Runs as rows of a table, for the page and for the terminal."""

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from lightlm.quantities import format_quantity
from lightlm.report.record import Record


def _hours(hours: float) -> str:
    """Write a time in seconds, minutes or hours."""
    if hours < 3 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 3 else f"{hours:.1f} h"


# Key of `Record.summary`, heading, heading in an 80-column terminal (empty: left out there), format.
_COLUMNS: list[tuple[str, str, str, Callable[[Any], str]]] = [
    ("parameters", "Parameters", "Params", format_quantity),
    ("active_parameters", "Active", "Active", format_quantity),
    ("flops_per_token", "FLOPs per token", "", format_quantity),
    ("tokens", "Tokens", "Tokens", format_quantity),
    ("step", "Steps", "Steps", "{:,}".format),
    ("loss", "Loss", "Loss", "{:.4f}".format),
    ("val_loss", "Validation loss", "Val", "{:.4f}".format),
    ("val_bpb", "Bits per byte", "BPB", "{:.4f}".format),
    ("tokens_per_second", "Tokens/s", "Tok/s", "{:,.0f}".format),
    ("mfu", "MFU", "MFU", "{:.1%}".format),
    ("hours", "Time", "Time", _hours),
    ("data", "Data", "", lambda dataset: PurePath(dataset).name),
    ("device", "Device", "", str),
]


def summary_table(records: Sequence[Record], *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the headings and each run's texts, without columns that are empty for all runs."""
    summaries = [record.summary() for record in records]
    columns: dict[str, list[str]] = {}
    for key, long_heading, short_heading, write in _COLUMNS:
        texts = ["" if (value := summary[key]) is None else write(value) for summary in summaries]
        heading = short_heading if short else long_heading
        if heading and any(texts):
            columns[heading] = texts
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]
