"""The record of what an export wrote into a folder, so that a later export may replace it."""

import json
from pathlib import Path

from lightlm import __version__, files

RECORD = "lightlm_export.json"


def write_record(folder: Path, source: Path) -> None:
    """Write the checksums of all files in a folder, once it is complete.

    Args:
        source: where the exported model was.
    """
    record = {"lightlm_version": __version__, "source": source.as_posix(), "xxh3": _checksums(folder)}
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_untouched_export(folder: Path) -> bool:
    """Return whether a folder holds exactly what an export wrote, so that replacing it loses nothing."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))["xxh3"] == _checksums(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD)
    return {path.relative_to(folder).as_posix(): files.checksum(path) for path in found}
