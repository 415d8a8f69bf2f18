"""The record of an export: the files it wrote, so that a later export may replace them and nothing else."""

import json
from pathlib import Path

from lightlm import __version__, files

RECORD = "lightlm_export.json"


def write_record(folder: Path, source: Path) -> None:
    """List the checksums of a finished export's files in its folder.

    Args:
        source: the model that was exported.
    """
    sums = {file.name: files.checksum(file) for file in sorted(folder.iterdir())}
    record = {"lightlm_version": __version__, "source": source.as_posix(), "xxh3": sums}
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_untouched_export(folder: Path) -> bool:
    """Return whether a folder holds exactly what an export wrote, so that replacing it loses nothing."""
    try:
        sums = json.loads((folder / RECORD).read_text(encoding="utf-8"))["xxh3"]
        return {path.name for path in folder.iterdir()} == {*sums, RECORD} and all(
            files.checksum(folder / name) == value for name, value in sums.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
