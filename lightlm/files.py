"""Atomic writes of files and folders (temporary name, fsync, rename), pointers, checksums, locks and full disks."""

import contextlib
import errno
import functools
import glob
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from lightlm.errors import DataError, DiskFullError, LightLMError, UsageError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_STALE_SECONDS = 3600  # a temporary file of this age was left by a kill: writing one file takes less
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or a limit (ulimit -f) allows",
}
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# In the messages of safetensors (older ones print Rust's structure), tokenizers and pyarrow.
_NUMBER = re.compile(r"(?:os error|errno|Os \{ code:) (\d+)", re.IGNORECASE)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What torch.save and numpy's tofile say when a write fails; they give no reason.
_FAILED_WRITE = re.compile(r"inline_container|PytorchStreamWriter|requested and \d+ written")

_FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what those of macOS and Windows leave in a folder


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, without what a file manager left there."""
    return sorted(path.name for path in folder.iterdir() if path.name not in _FILE_MANAGERS)


def no_room(error: BaseException) -> str:
    """Return why there is no room on the disk, if an error of Python or of a library means that; else an empty text."""
    if isinstance(error, DiskFullError) and error.__cause__ is not None:
        error = error.__cause__
    if (number := getattr(error, "errno", None)) in _NO_ROOM:
        return _NO_ROOM[number]
    text = str(error)
    for match in _NUMBER.finditer(text):
        if int(match[1]) in _NO_ROOM:
            return _NO_ROOM[int(match[1])]
        if os.name == "nt" and match[1] == "112":
            return _NO_ROOM[errno.ENOSPC]
    return "the disk is probably full" if _FAILED_WRITE.search(text) else ""


@contextlib.contextmanager
def writing(target: Path | None = None) -> Iterator[None]:
    """Context manager that raises an error of its block, which writes `target`, as a DiskFullError if it means that.

    Other errors pass. Without `target`, the message names the file that the error names, if any.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not (reason := no_room(error)):
            raise
        place = target or getattr(error, "filename", None) or "a file"
        raise DiskFullError(f"{place} could not be written: {reason}. Free some space, then try again") from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, where its file system can.

    Windows cannot open a folder and does not need to; some network file systems refuse to flush one.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    # Windows flushes only through a descriptor open for writing.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _temporary(path: Path) -> Path:
    """Return a temporary name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def new_file(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Context manager that gives the name of a temporary file to write, and replaces `path` by it after the block.

    A kill at any instant leaves the old or the new content. Several processes may do so.

    Args:
        exclusive: no other process does so; what a kill left is removed at once, not after an hour.

    Raises:
        DiskFullError: there is no room; `path` is unchanged.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # by a kill
        with contextlib.suppress(FileNotFoundError):
            if exclusive or time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
    temporary = _temporary(path)
    try:
        with writing(path):
            yield temporary
            sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` atomically; see `new_file`."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replace `path` by UTF-8 text; see `write_bytes`."""
    write_bytes(path, content.encode())


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Context manager that gives a temporary folder to fill, flushes it, and renames it to `path` after the block.

    With `overwrite`, an existing folder stays in place until the new one is complete. On an error the temporary folder
    is removed and `path` is unchanged. If `path` is a symbolic link, its target is replaced.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
        UsageError: `path` is or holds the working directory.
        DiskFullError: there is no room.
        OSError: `path` is a mount point, which cannot be renamed.
    """
    path = path.resolve()
    restore_folder(path)
    if path.exists() and not overwrite:
        raise FileExistsError(path)
    refuse_working_folder(path)
    if path.is_mount():
        raise OSError(f"{path} is a mount point, which cannot be replaced; name a folder inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    remove_folder(temporary)
    try:
        with writing(path):
            temporary.mkdir()  # inside the block: a signal may come right after it
            yield temporary
            sync_tree(temporary)
    except BaseException:
        remove_folder(temporary)
        raise
    replace_folder(temporary, path)


@contextlib.contextmanager
def put_back(path: Path) -> Iterator[None]:
    """Context manager that puts back the file or folder that `path` was, if an error ends the block.

    What is kept shares its content by hard links where the disk can, so the block must replace files and not change
    them. A kill leaves it beside `path` under a hidden name, until the next call.
    """
    path = path.resolve()
    kept, is_folder = path.with_name(f".{path.name}.kept"), path.is_dir()
    remove_folder(kept) if kept.is_dir() else kept.unlink(missing_ok=True)
    if not path.exists():
        yield
        return
    remove = remove_folder if is_folder else functools.partial(Path.unlink, missing_ok=True)
    try:
        if is_folder:
            shutil.copytree(path, kept, copy_function=_link)
        else:
            _link(path, kept)
    except BaseException:
        if kept.exists():
            remove(kept)
        raise
    try:
        yield
    except BaseException:
        if is_folder:
            replace_folder(kept, path)
        else:
            os.replace(kept, path)
        raise
    remove(kept)


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the disk has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def refuse_working_folder(path: Path) -> None:
    """Raise UsageError if a folder to replace is or holds the working directory, which would be renamed and deleted."""
    if path.exists() and Path.cwd().is_relative_to(path.resolve()):
        raise UsageError(
            f"{path.resolve()} is or holds the working directory, which would be replaced; name a folder inside it, or "
            "run the command in another folder"
        )


def sync_tree(folder: Path) -> None:
    """Flush a folder and every file below it to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync_file(file)
    sync_folder(folder)


def restore_folder(path: Path) -> None:
    """Undo a `replace_folder` that a kill interrupted between its two renames."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)


def replace_folder(new: Path, path: Path) -> None:
    """Rename the complete folder `new` to `path` on the same disk; an existing `path` is deleted."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        remove_folder(old)
        os.replace(path, old)
    os.replace(new, path)
    remove_folder(old)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder if it exists. It is renamed first, so a kill never leaves half of it under its name.

    A symbolic link is deleted as a link: the folder that it leads to stays.
    """
    if path.is_symlink():
        path.unlink()
        return
    if not path.exists():
        return
    if not path.name.startswith("."):
        shutil.rmtree(doomed := path.with_name(f".{path.name}.deleted"), ignore_errors=True)
        path = path.replace(doomed)
    shutil.rmtree(path)


def clear_leftovers(folder: Path) -> None:
    """Remove temporary files that a kill left in a folder. No other process may write to the folder."""
    for path in folder.glob(".*"):
        if path.suffix == ".old":
            restore_folder(path.with_name(path.stem.removeprefix(".")))
        if path.suffix in (".partial", ".old", ".deleted"):
            with contextlib.suppress(FileNotFoundError):  # restored
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a path is a Git LFS pointer: the few lines that stand for a file which was not downloaded."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def refuse_lfs_pointer(path: Path) -> None:
    """Raise DataError if a path is a Git LFS pointer."""
    if is_lfs_pointer(path):
        raise DataError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or download the "
            "file again"
        )


def read_object(path: Path, error: type[LightLMError], *, optional: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; with `optional`, an empty one if there is no file.

    Raises:
        LightLMError: the file is missing or damaged; of the class `error`.
        DataError: it is a Git LFS pointer.
    """
    refuse_lfs_pointer(path)
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        if optional and isinstance(cause, FileNotFoundError):
            return {}
        raise error(f"{path} cannot be read: {cause}") from None
    if not isinstance(values, dict):
        raise error(f"{path} is not a JSON object")
    return values


def checksum(path: Path) -> str:
    """Return the xxh3 of a file: 64 bits as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    block = memoryview(bytearray(1 << 22))  # reused: allocating memory for each read would cost more than the hash
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def point_to(link: Path, target_name: str) -> None:
    """Point `link` to its sibling `target_name` by a symbolic link, or by a text file where links are not allowed.

    A folder in its place, made by a tool that copies what links lead to, is renamed to `<link>.copied`.
    """
    temporary = _temporary(link)
    with writing(link):
        try:
            temporary.symlink_to(target_name, target_is_directory=True)
        except OSError:  # Windows without developer mode
            temporary.write_text(target_name, encoding="utf-8")
    if link.is_dir() and not link.is_symlink():
        replace_folder(link, link.with_name(f"{link.name}.copied"))
    os.replace(temporary, link)
    sync_folder(link.parent)


def follow(link: Path) -> Path | None:
    """Return the target of a pointer made by `point_to`, or None if `link` is not a pointer."""
    if link.is_symlink():
        return link.parent / os.readlink(link)
    return link.parent / link.read_text(encoding="utf-8").strip() if link.is_file() else None


def acquire(lock: "BaseFileLock", *, timeout: float) -> bool:
    """Take a lock; return False on a file system without locks, where filelock fails in several ways.

    Raises:
        filelock.Timeout: another process holds it.
    """
    try:
        lock.acquire(timeout=timeout, poll_interval=0.05)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextlib.contextmanager
def explain_disk_errors(target: Path) -> Iterator[None]:
    """Context manager that raises a disk error of its block, which writes `target`, as a DataError with advice."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LightLMError) and not isinstance(error, DiskFullError):
            raise
        if no_room(error):
            places = f"{target.parent} (or {tempfile.gettempdir()}, for temporary files)"
            cause = error.__cause__ if isinstance(error, DiskFullError) else error
            problem = f"The disk that holds {places} is full ({getattr(cause, 'strerror', cause)}). Free some space"
        elif isinstance(error, OSError):
            problem = f"{error.filename or target}: {error.strerror or error}"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                problem += ". Change its permissions, or choose another folder with --out"
        else:
            raise
        raise DataError(f"{problem}. Progress is saved. Rerun the same command to resume.") from error


def cache_folder() -> Path:
    """Return the folder of what can be found out again: lightlm in `XDG_CACHE_HOME` or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightlm"
