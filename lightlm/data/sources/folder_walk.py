"""The files below a folder, and those of them that are not read, by suffix."""

import errno
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightlm.data.readers.file import raise_machine_fault
from lightlm.data.readers.opening import COMPRESSIONS
from lightlm.errors import DataError

OTHER = "other"
KINDS = 50  # that are counted by name
_WRAPPERS = {*COMPRESSIONS, ".zip", ".lz4", ".z", ".7z"}  # the suffix before these says what is inside


class Entry(NamedTuple):
    """A file, or what only looks like one: a broken link, a pipe. `linked`: a link to a folder leads to it."""

    path: Path
    linked: bool


class FolderWalk:
    """One pass over the files below a folder; iterate once.

    Links to folders are followed. Each folder is entered once: a real one rather than a link to it. Hidden files and
    folders are counted in `left_out`, and so are links to folders that are entered otherwise. `unreadable` has an error
    for each folder that cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self.unreadable: dict[Path, DataError] = {}
        self._root = root

    def __iter__(self) -> Iterator[Entry]:
        """Yield the visible files, in no particular order. Raises DataError where the root cannot be read."""
        entered = {_identity(folder) for folder in self._root.parents}  # a link to one of them is a loop
        waiting = [Entry(self._root, linked=False)]
        links: list[Entry] = []
        while waiting or links:
            if not waiting:
                links.sort(reverse=True)
                waiting.append(links.pop())
            folder, linked = waiting.pop()
            try:
                identity = _identity(folder)
                if identity in entered:
                    self.left_out["link to a folder that is read elsewhere"] += 1
                    continue
                entered.add(identity)
                with os.scandir(folder) as entries:
                    for entry in entries:
                        path = folder / entry.name
                        if is_hidden(entry.name):
                            self.left_out["hidden folder" if _is_folder(entry) else "hidden file"] += 1
                        elif entry.is_dir(follow_symlinks=False):
                            waiting.append(Entry(path, linked))
                        elif _is_folder(entry):
                            links.append(Entry(path, linked=True))
                        else:
                            yield Entry(path, linked)
            except OSError as error:
                raise_machine_fault(error)
                if folder == self._root:
                    raise _unreadable(folder, error) from error
                self.unreadable[folder] = _unreadable(folder, error)


def fault_of(folder: Path) -> DataError | None:
    """Return the error for a folder that cannot be read."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise_machine_fault(error)
        return _unreadable(folder, error)
    return None


def _unreadable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: this folder cannot be read ({error.strerror})")


def is_hidden(name: str) -> bool:
    """Return whether a name is not that of the user's data; ext4 has a lost+found in each volume."""
    return name.startswith(".") or name == "lost+found"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether it is a folder or leads to one; a link that leads to itself does not."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def kind_of(name: str) -> str:
    """Return the suffix under which a file that is not read is counted, for example ".pdf" or ".tar.gz"."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in _WRAPPERS:
        suffix = os.path.splitext(stem)[1] + suffix
    if not suffix:
        return "without suffix"
    return suffix if re.fullmatch(r"(\.[a-z][\w+-]{0,9}|\.7z){1,2}", suffix, re.ASCII) else OTHER


def most_common(counts: Counter[str]) -> dict[str, int]:
    """Return the counts, the largest first; of more than `KINDS` kinds, the rest as `OTHER`."""
    ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    kept = dict(list(ordered.items())[:KINDS])
    rest = sum(ordered.values()) - sum(kept.values())
    return kept | ({OTHER: kept.get(OTHER, 0) + rest} if rest else {})
