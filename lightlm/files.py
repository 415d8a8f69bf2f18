"""Atomic writes of files and folders (temporary name, fsync, rename), pointers, checksums and disk errors."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lightlm.errors import DataError


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows cannot open a folder and does not need to."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    # Windows flushes only through a descriptor open for writing.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` atomically: a kill at any instant leaves the old or the new content."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


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
        OSError: `path` is a mount point, which cannot be renamed.
    """
    path = path.resolve()
    restore_folder(path)
    if path.exists() and not overwrite:
        raise FileExistsError(path)
    if path.is_mount():
        raise OSError(f"{path} is a mount point, which cannot be replaced; name a folder inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    remove_folder(temporary)
    try:
        temporary.mkdir()  # inside the block: a signal may come right after it
        yield temporary
        sync_tree(temporary)
    except BaseException:
        remove_folder(temporary)
        raise
    replace_folder(temporary, path)


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
    """Delete a folder if it exists. It is renamed first, so a kill never leaves half of it under its name."""
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


def checksum(path: Path) -> str:
    """Return the xxh3 of a file: 64 bits as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    block = memoryview(bytearray(1 << 22))  # reused: allocating memory for each read would cost more than the hash
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def point_to(link: Path, target_name: str) -> None:
    """Point `link` to its sibling `target_name` by a symbolic link, or by a text file where links are not allowed."""
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target_name, target_is_directory=True)
    except OSError:  # Windows without developer mode
        temporary.write_text(target_name, encoding="utf-8")
    os.replace(temporary, link)
    sync_folder(link.parent)


def follow(link: Path) -> Path | None:
    """Return the target of a pointer made by `point_to`, or None if `link` is not a pointer."""
    if link.is_symlink():
        return link.parent / os.readlink(link)
    return link.parent / link.read_text(encoding="utf-8").strip() if link.is_file() else None


@contextlib.contextmanager
def clear_errors(target: Path) -> Iterator[None]:
    """Context manager that raises an OSError of its block, which writes `target`, as a DataError with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            places = f"{target.parent} (or {tempfile.gettempdir()}, for temporary files)"
            problem = f"The disk that holds {places} is full ({error.strerror}). Free some space"
        else:
            problem = f"{error.filename or target}: {error.strerror or error}"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                problem += ". Change its permissions, or choose another folder with --out"
        raise DataError(f"{problem}. Progress is saved. Rerun the same command to resume.") from error
