"""Runs as rows of a table, for the page and for the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightlm.quantities import format_quantity
from lightlm.report.record import Record


@dataclass(frozen=True)
class Column:
    """One figure of `Record.summary`; without a `short` heading it is left out in a terminal, which has 80 columns."""

    key: str
    heading: str
    short: str
    write: Callable[[Any], str]


def _hours(hours: float) -> str:
    """A time in the unit a person would use."""
    if hours < 3 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 3 else f"{hours:.1f} h"


_COLUMNS = [
    Column("parameters", "Parameters", "Params", format_quantity),
    Column("active_parameters", "Active", "Active", format_quantity),
    Column("flops_per_token", "FLOPs a token", "", format_quantity),
    Column("tokens", "Tokens", "Tokens", format_quantity),
    Column("step", "Steps", "Steps", "{:,}".format),
    Column("loss", "Loss", "Loss", "{:.4f}".format),
    Column("val_loss", "Validation loss", "Val", "{:.4f}".format),
    Column("val_bpb", "Bits a byte", "BPB", "{:.4f}".format),
    Column("tokens_per_second", "Tokens/s", "Tok/s", "{:,.0f}".format),
    Column("mfu", "MFU", "MFU", "{:.1%}".format),
    Column("hours", "Time", "Time", _hours),
    Column("spikes", "Spikes", "", lambda count: f"{count:,}" if count else ""),
    Column("data", "Data", "", str),
    Column("device", "Device", "", str),
]


def summary_table(records: Sequence[Record], *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headings, and for each run its texts; columns that no run has a figure for are left out."""
    summaries = [record.summary() for record in records]
    headings, columns = [], []
    for column in _COLUMNS:
        values = [summary[column.key] for summary in summaries]
        texts = ["" if value is None else column.write(value) for value in values]
        heading = column.short if short else column.heading
        if heading and any(texts):
            headings.append(heading)
            columns.append(texts)
    return headings, [list(row) for row in zip(*columns, strict=True)]
