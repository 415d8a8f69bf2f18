"""Parquet files are opened by footers that are kept, and Arrow gives memory back."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from lightlm.data.select.filters import Filter
from lightlm.data.sources.local import open_source
from tests.data.sources.test_local import write_parquet


def read(path: Path, chosen: Filter | None = None) -> list[str]:
    return [text for unit in open_source(str(path), "text", chosen).units() for text in unit.read()]


@pytest.mark.parametrize("chosen", [None, Filter("score >= 40")], ids=["all", "filtered"])
def test_a_footer_is_parsed_once_however_many_row_groups(
    chosen: Filter | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pyarrow.table({"text": [f"document {n}" for n in range(50)], "score": range(50)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    parsed: list[object] = []
    real = parquet.read_metadata
    monkeypatch.setattr(parquet, "read_metadata", lambda source: parsed.append(source) or real(source))
    assert read(tmp_path / "a.parquet", chosen) == [f"document {n}" for n in range(40 if chosen else 0, 50)]
    assert len(parsed) == 1


def test_a_file_that_is_written_again_has_another_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one", "two"])
    assert read(path) == ["one", "two"]
    write_parquet(path, ["three"])
    os.utime(path, ns=(1, 1))
    assert read(path) == ["three"]


def test_arrow_gives_freed_memory_back_unless_told_otherwise() -> None:
    """Half of a text of 500 MB more, measured (benchmarks/results/large-document.json); too large to do it here."""
    code = "import lightlm.data.readers.files, pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    environment = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    for chosen in ({}, {"ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | chosen, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == chosen.get("ARROW_DEFAULT_MEMORY_POOL", "system")
