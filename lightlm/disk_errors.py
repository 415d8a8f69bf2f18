"""What a failing disk or a missing permission means for the user of `prepare-data`."""

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lightlm.errors import DataError


@contextlib.contextmanager
def clear_errors(target: Path) -> Iterator[None]:
    """Raises DataError for an OSError, with what to do about it and about the folder `target` that is written."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename or target}: " if error.errno not in (errno.ENOSPC, errno.EDQUOT) else ""
        if not where:
            places = f"{target.parent} (or {tempfile.gettempdir()}, for temporary files)"
            advice = f"The disk that holds {places} is full ({error.strerror}). Free some space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"{where}{error.strerror}. Allow it, or choose another folder with --out"
        else:
            advice = f"{where}{error.strerror or error}. See to it"
        raise DataError(f"{advice}, and run the same command again: what is finished is kept.") from error
