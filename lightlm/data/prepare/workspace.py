"""The folder in which a preparation is under way: `.<name>.partial` beside the folder that it will become.

folder/           becomes the data folder by a rename: shards, tokenizer.json, at last manifest.json
work/             what is needed to go on: settings.json, state.json, pieces/
lock              held by the process at work
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lightlm.errors import DataError
from lightlm.files import remove_folder, replace_folder, sync_tree, write_text

PIECES_FORMAT = 1  # another version's pieces are not gone on with

Setting = str | int | float | None


class Partial:
    """A preparation under way. `resumed` says that an earlier process began it."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.partial")
        self.folder, self.work = self.path / "folder", self.path / "work"
        self.pieces = self.work / "pieces"
        self.resumed = False
        self._target = target
        self._note = self.work / "settings.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out. Raises DataError where one is at work."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / "lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            yield
        except Timeout as error:
            raise DataError(
                f"Another `lightlm prepare-data` is writing {self._target}; wait for it, or choose another folder "
                "with --out"
            ) from error
        finally:
            mine = lock.is_locked or not any(self.path.glob("*"))  # a signal may come before the lock
            lock.release()
            if mine and not self._note.exists():
                remove_folder(self.path)

    def open(self, settings: Mapping[str, Setting], *, overwrite: bool) -> str | None:
        """Go on with what is there, or begin; gives the source's revision as it was when the preparation began.

        What `--overwrite` began, `--overwrite` goes on with; anything else it throws away, and so is what has no
        finished block. Raises DataError where other settings are under way.
        """
        note = self._read()
        whole = note is not None and self.folder.is_dir()  # else a kill came right after the folder was put in place
        if note is None or not whole or (overwrite and not (note["overwrite"] and note["settings"] == dict(settings))):
            self._begin(settings, overwrite)
            return None
        changed = different_settings(note["settings"], settings)
        if changed and not self.worth_keeping:
            self._begin(settings, overwrite)
            return None
        if changed:
            raise DataError(
                f"{self.path} holds an unfinished preparation with other settings ({changed}). Finish it with those, "
                "use --overwrite to start over, or --out for another folder."
            )
        self.resumed = True
        return note["revision"]

    def note_revision(self, revision: str | None) -> None:
        """Write down which state of the source is read, before any of it is."""
        note = self._read() or {}
        write_text(self._note, json.dumps(note | {"revision": revision}))

    def finish(self) -> None:
        """Make the folder the data folder."""
        sync_tree(self.folder)
        replace_folder(self.folder, self._target)
        self.discard()

    def discard(self) -> None:
        """Remove everything; `locked` removes the rest."""
        self._note.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what a kill left that came after the folder was put in place."""
        if self.path.is_dir() and not self.folder.exists():
            with contextlib.suppress(DataError), self.locked():  # another process may be at this very moment
                self.discard()

    @property
    def worth_keeping(self) -> bool:
        """Whether at least one block is finished."""
        return (self.work / "state.json").exists() or any(self.pieces.glob("[0-9]*.json"))

    def _read(self) -> dict | None:
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return note if note.get("pieces_format") == PIECES_FORMAT else None

    def _begin(self, settings: Mapping[str, Setting], overwrite: bool) -> None:
        self._note.unlink(missing_ok=True)
        remove_folder(self.folder)
        remove_folder(self.work)
        self.folder.mkdir()
        self.pieces.mkdir(parents=True)
        note = {"pieces_format": PIECES_FORMAT, "settings": dict(settings), "overwrite": overwrite, "revision": None}
        write_text(self._note, json.dumps(note))


def different_settings(there: Mapping[str, Setting], now: Mapping[str, Setting]) -> str:
    """What differs, in words; empty where nothing does. A setting that is absent is at its default, None."""
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    return "; ".join(f"{name}: {there.get(name)} there, {now.get(name)} now" for name in names)
