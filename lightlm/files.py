"""Files and folders that appear whole or not at all: temporary name, fsync, rename."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash

_TEMPORARY = (".partial", ".old", ".deleted")  # what temporary names end with; they begin with a dot


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows cannot open a folder, and does not need it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush what has been written to a file to the disk."""
    # Windows flushes only through a descriptor open for writing.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; a kill at any instant leaves the old or the new file."""
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
    """A temporary folder to fill, which becomes `path` when the block ends without an error.

    Every file in it is flushed to disk before the rename. With `overwrite`, an existing folder stays in place
    until the new one is complete. On an error the temporary folder is removed and `path` is untouched. A symbolic
    link is followed: the folder it leads to is filled, on its own disk.

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
        temporary.mkdir()  # inside, since a signal may come right after it
        yield temporary
        sync_tree(temporary)
    except BaseException:
        remove_folder(temporary)
        raise
    replace_folder(temporary, path)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folder, to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync_file(file)
    sync_folder(folder)


def restore_folder(path: Path) -> None:
    """Undo the first half of a `replace_folder` that a kill cut short."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)


def replace_folder(new: Path, path: Path) -> None:
    """Give the complete folder `new`, on the same disk, the name `path`; a folder of that name is deleted."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        remove_folder(old)
        os.replace(path, old)
        os.replace(new, path)
        remove_folder(old)
    else:
        os.replace(new, path)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder if it is there. It is renamed first, so that a kill never leaves half of it under its name."""
    if not path.exists():
        return
    doomed = path if path.name.startswith(".") else path.with_name(f".{path.name}.deleted")
    if doomed != path:
        if doomed.exists():
            shutil.rmtree(doomed)
        os.replace(path, doomed)
    shutil.rmtree(doomed)


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left of the functions above. Only for a folder that no other process writes to."""
    for path in folder.glob(".*"):
        name = path.stem.removeprefix(".")
        if path.suffix == ".old" and not (folder / name).exists():
            os.replace(path, folder / name)  # a kill between the two renames of `new_folder`
        elif path.suffix in _TEMPORARY:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def checksum(path: Path) -> str:
    """The xxh3 (64 bits, 16 hexadecimal digits) of a whole file."""
    digest = xxhash.xxh3_64()
    block = memoryview(bytearray(1 << 22))  # one for all reads: fresh memory would cost more than the hash
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def point_to(link: Path, target_name: str) -> None:
    """Make `link` point to its sibling `target_name`: a symbolic link, or a text file where links are not allowed."""
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target_name, target_is_directory=True)
    except OSError:  # Windows without developer mode
        temporary.write_text(target_name, encoding="utf-8")
    os.replace(temporary, link)
    sync_folder(link.parent)


def follow(link: Path) -> Path | None:
    """The folder that a pointer made by `point_to` names, or None where there is no pointer."""
    if link.is_symlink():
        return link.parent / os.readlink(link)
    if link.is_file():
        return link.parent / link.read_text(encoding="utf-8").strip()
    return None
