"""What a failing disk or a missing permission means for the user of `prepare-data`."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lightlm.errors import DataError


@contextlib.contextmanager
def clear_errors(target: Path) -> Iterator[None]:
    """Turn an OSError while writing the folder `target` into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename or target}: " if error.errno not in (errno.ENOSPC, errno.EDQUOT) else ""
        if not where:
            places = f"{target.parent} (or {tempfile.gettempdir()}, for temporary files)"
            advice = f"The disk that holds {places} is full ({error.strerror}). Free some space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"{where}{error.strerror}. Grant access, or choose another folder with --out"
        else:
            advice = f"{where}{error.strerror or error}. Check the disk"
        raise DataError(f"{advice}. Progress is saved. Rerun the same command to resume.") from error
