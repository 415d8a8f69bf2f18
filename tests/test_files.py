import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from lightlm import files
from lightlm.errors import DataError, DiskFullError, UsageError


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), files.new_folder(target) as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        assert not target.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.new_folder(target) as folder:
        (folder / "whole").write_text("y")
    assert (target / "whole").read_text() == "y"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not flush folders")
@pytest.mark.parametrize(("code", "works"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.ENOSPC, False)])
def test_a_file_system_that_cannot_flush_folders_is_no_failure(tmp_path, monkeypatch, code, works):
    def refusing(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refusing)
    if works:
        files.sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.sync_folder(tmp_path)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_what_a_failed_block_replaced_is_put_back(tmp_path, monkeypatch, kind, links):
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links here")))
    path = tmp_path / "out"
    part = path / "deep" / "part" if kind == "folder" else path

    def write(text):
        if kind == "folder":
            with files.new_folder(path, overwrite=True) as folder:
                (folder / "deep").mkdir()
                (folder / "deep" / "part").write_text(text)
        else:
            with files.new_file(path, exclusive=True) as temporary:  # removes what kills have left
                temporary.write_text(text)

    if kind != "nothing":
        write("good")
    with files.put_back(path):
        write("better")
    assert part.read_text() == "better"
    with pytest.raises(KeyboardInterrupt), files.put_back(path):  # noqa: PT012
        write("bad")
        raise KeyboardInterrupt
    assert part.read_text() == "better"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_overwrite_leaves_the_old_folder(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("good")
    with pytest.raises(KeyboardInterrupt), files.new_folder(target, overwrite=True) as folder:  # noqa: PT012
        (folder / "new").write_text("bad")
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["old"]
    with files.new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("better")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_existing_folder_is_not_replaced_unasked(tmp_path):
    with pytest.raises(FileExistsError), files.new_folder(tmp_path):
        pass


@pytest.mark.parametrize("inside", [".", "deep"])
def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch, inside):
    (here := tmp_path / "out" / inside).mkdir(parents=True)
    monkeypatch.chdir(here)
    with (
        pytest.raises(UsageError, match="out is or holds the working directory"),
        files.new_folder(tmp_path / "out", overwrite=True),
    ):
        pass
    assert Path.cwd().samefile(here)


def test_a_link_is_removed_as_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "data").write_text("kept", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "big", target_is_directory=True)
    files.remove_folder(tmp_path / "link")
    assert [path.name for path in tmp_path.rglob("*")] == ["big", "data"]


def test_left_over_partial_folders_are_cleared(tmp_path):
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "stale").write_text("x")
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "fresh").write_text("y")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fresh"]


def test_write_text_replaces(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "one")
    files.write_text(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert list(tmp_path.iterdir()) == [path]


def refuse_links(*args, **kwargs):
    raise OSError("no privilege")


@pytest.mark.parametrize("links", [True, False])
def test_a_pointer_works_with_and_without_symbolic_links(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "symlink", refuse_links)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.point_to(tmp_path / "latest", name)
        assert files.follow(tmp_path / "latest") == tmp_path / name
    assert (tmp_path / "latest").is_symlink() == links
    assert files.follow(tmp_path / "nothing") is None


def test_a_linked_folder_is_filled_where_it_leads(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "big")
    with files.new_folder(tmp_path / "linked", overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert (tmp_path / "linked").is_symlink()
    assert (tmp_path / "big" / "new").read_text() == "x"


def test_a_folder_set_aside_by_a_kill_comes_back(tmp_path):
    aside = tmp_path / ".out.old"
    aside.mkdir()
    (aside / "good").write_text("x")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "good").read_text() == "x"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (Exception('Error: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'), "the disk is full"),
        (OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "probably full"),
        (OSError("2000000 requested and 0 written"), "probably full"),
        (OSError(errno.EACCES, "Permission denied"), ""),
        (RuntimeError("shape mismatch (os error 2)"), ""),
    ],
)
def test_a_full_disk_is_recognized_whichever_library_fails(tmp_path, error, reason):
    assert reason in files.no_room(error)
    assert bool(reason) == bool(files.no_room(error))
    with pytest.raises(DiskFullError if reason else type(error)) as raised, files.writing(tmp_path / "file"):
        raise error
    assert not reason or f"{tmp_path / 'file'} could not be written: " in str(raised.value)


def test_two_processes_may_write_one_file_at_once(tmp_path):
    write = "import sys; from pathlib import Path; from lightlm import files\n"
    write += "for _ in range(30): files.write_text(Path('file'), sys.argv[1] * 100_000); files.point_to(Path('p'), 'x')"
    writers = [subprocess.Popen([sys.executable, "-c", write, letter], cwd=tmp_path) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert set((tmp_path / "file").read_text()) in ({"a"}, {"b"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "p"]


def test_what_a_kill_left_long_ago_is_removed_by_the_next_write(tmp_path):
    old, fresh = tmp_path / ".file.0.partial", tmp_path / ".file.1.partial"
    for path in (old, fresh):
        path.touch()
    os.utime(old, (0, 0))
    files.write_text(tmp_path / "file", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.1.partial", "file"]


def test_git_lfs_pointers_are_named(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2141\nsize 12345\n")
    with pytest.raises(DataError, match=r"model\.safetensors is a Git LFS pointer, not the file itself; run `git lfs"):
        files.refuse_lfs_pointer(pointer)
    pointer.write_bytes(b"\x00" * 100)
    for path in (pointer, tmp_path, tmp_path / "none"):
        files.refuse_lfs_pointer(path)
