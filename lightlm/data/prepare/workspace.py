"""The folder of an unfinished preparation: `.<name>.partial` beside the data folder to be.

folder/           becomes the data folder by a rename: shards, tokenizer.json, finally manifest.json
work/             what resuming needs: settings.json, state.npz, blocks/
lock              held by the process at work
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lightlm.errors import DataError
from lightlm.files import remove_folder, replace_folder, sync_tree, write_text

WORK_FORMAT = 2  # an unfinished preparation of another format starts over

Setting = str | int | float | None


class Workspace:
    """The folder of an unfinished preparation of the data folder `target`."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.partial")
        self.folder, self.work = self.path / "folder", self.path / "work"
        self.blocks, self.state = self.work / "blocks", self.work / "state.npz"
        self._target = target
        self._settings = self.work / "settings.json"

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
            if mine and not self._settings.exists():
                remove_folder(self.path)

    def open(self, settings: Mapping[str, Setting], *, overwrite: bool) -> str | None:
        """Resume or begin a preparation; return the source's revision at its beginning, None for a new one.

        With `overwrite`, resumes only what began with `overwrite` and the same settings. Starts over where no block is
        finished. Raises DataError where a preparation with other settings is unfinished.
        """
        saved = self._read() if self.folder.is_dir() else None  # without the folder, a kill followed the final rename
        changed = different_settings(saved["settings"], settings) if saved else ""
        if saved is None or (overwrite and (changed or not saved["overwrite"])) or (changed and not self.worth_keeping):
            self._settings.unlink(missing_ok=True)
            remove_folder(self.folder)
            remove_folder(self.work)
            self.folder.mkdir()
            self.blocks.mkdir(parents=True)
            content = {"format": WORK_FORMAT, "settings": dict(settings), "overwrite": overwrite, "revision": None}
            write_text(self._settings, json.dumps(content))
            return None
        if changed:
            raise DataError(
                f"{self.path} holds an unfinished preparation with other settings ({changed}). Finish it with those, "
                "use --overwrite to start over, or --out for another folder."
            )
        return saved["revision"]

    def save_revision(self, revision: str | None) -> None:
        """Save the source's revision, before any text is prepared."""
        self._save(revision=revision)

    def save_end_of_text(self, index: int) -> None:
        """Save the id of the token that separates documents, which a tokenizer.json does not name."""
        self._save(end_of_text_id=index)

    @property
    def end_of_text_id(self) -> int | None:
        """The id that `save_end_of_text` saved; None in an unfinished preparation of an older version."""
        return (self._read() or {}).get("end_of_text_id")

    def save_chat(self, template: str, added_tokens: tuple[str, ...]) -> None:
        """Save where the chat template of conversations comes from, and the special tokens that it needed."""
        self._save(chat_template=template, added_tokens=" ".join(added_tokens))

    @property
    def chat(self) -> tuple[str, list[str]]:
        """What `save_chat` saved."""
        saved = self._read() or {}
        return saved["chat_template"], saved["added_tokens"].split()

    def _save(self, **values: Setting) -> None:
        write_text(self._settings, json.dumps((self._read() or {}) | values))

    def finish(self) -> None:
        """Rename the folder to the data folder."""
        sync_tree(self.folder)
        replace_folder(self.folder, self._target)
        self.discard()

    def discard(self) -> None:
        """Give up the preparation; `locked` removes the files."""
        self._settings.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what a kill right after the final rename left."""
        if self.path.is_dir() and not self.folder.exists():
            with contextlib.suppress(DataError), self.locked():  # another process may hold the lock
                self.discard()

    @property
    def worth_keeping(self) -> bool:
        """Whether at least one block is finished."""
        return self.state.exists() or any(self.blocks.glob("[0-9]*.json"))

    def _read(self) -> dict | None:
        try:
            saved = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return saved if saved.get("format") == WORK_FORMAT else None


def different_settings(there: Mapping[str, Setting], now: Mapping[str, Setting]) -> str:
    """Describe the settings that differ; empty if none does. A setting that is absent has its default, None."""
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    return "; ".join(f"{name}: {there.get(name)} there, {now.get(name)} now" for name in names)
