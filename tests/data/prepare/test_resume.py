"""Killed and resumed. `LIGHTLM_KILLS=20 pytest tests/data/prepare/test_resume.py` kills more often and tells where."""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightlm.data.folder import DataFolder
from lightlm.data.prepare import assembly, blocks
from lightlm.data.prepare import encode as encoding_module
from lightlm.data.prepare.encoded_block import EncodedBlockWriter
from lightlm.data.prepare.run import prepare
from lightlm.data.prepare.workspace import Workspace
from lightlm.data.prepare.writer import SplitWriter
from lightlm.data.readers import jsonl as readers
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import DataError
from tests.corpus import texts
from tests.data.prepare.kills import Harness

KILLS = int(os.environ.get("LIGHTLM_KILLS", "3"))
SEED = int(os.environ.get("LIGHTLM_KILL_SEED", "1"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_source(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    train_tokenizer(texts(200), 500).save(tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither SIGKILL nor fork")
@pytest.mark.timeout(60 + 30 * KILLS)
def test_a_killed_preparation_ends_in_the_same_bytes(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.perf_counter()
    source = write_source(tmp_path / "source.jsonl", texts(1_500))
    harness = Harness(source, tokenizer, SEED)
    harness.complete(tmp_path / "whole", 0)
    expected = contents(tmp_path / "whole")
    folders = 0
    while len(harness.landed) < KILLS:
        folders += 1
        out = tmp_path / f"killed-{folders}"
        overwrite = folders % 3 == 0
        if overwrite:  # what is replaced, by a command that goes on as well
            prepare(str(source), tokenizer, out, max_tokens=5_000)
        harness.complete(out, 1 if KILLS > 3 and folders % 2 else 3, overwrite=overwrite)
        assert contents(out) == expected, harness.landed
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert left == [], harness.landed
    if "LIGHTLM_KILLS" in os.environ:
        with capsys.disabled():
            print(
                f"\n{len(harness.landed)} kills, {folders} folders equal to the reference, "
                f"{time.perf_counter() - began:.0f} s, seed {SEED}:",
                *harness.landed,
                sep="\n  ",
            )


class Stop(BaseException):
    """Ends a preparation as an interruption does."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(assembly, "SAVE_TOKENS", 10_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source.jsonl", texts(1_000))


@contextlib.contextmanager
def stopping(after: int, error: BaseException | None = None) -> Iterator[list[int]]:
    """Makes a preparation end with `error` in its `after`-th block; gives the numbers of the blocks encoded."""
    done: list[int] = []
    real = EncodedBlockWriter.__exit__

    def leave(self: EncodedBlockWriter, kind: object, *rest: object) -> None:
        if 0 <= after <= len(done):  # two threads may pass it together
            real(self, Stop, None, None)
            raise error or Stop
        real(self, kind, *rest)
        done.append(self.encoded.number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodedBlockWriter, "__exit__", leave)
        yield done


def test_what_is_finished_is_not_done_again(tmp_path: Path, source: Path, tokenizer: str, small: None) -> None:
    prepare(str(source), tokenizer, tmp_path / "whole")
    with stopping(9) as first, pytest.raises(Stop):
        prepare(str(source), tokenizer, tmp_path / "out", workers=1)
    assert (tmp_path / ".out.partial").is_dir()
    assert not (tmp_path / "out").exists()
    with stopping(-1) as second:
        manifest = prepare(str(source), tokenizer, tmp_path / "out", workers=3)
    assert not set(first) & set(second)
    assert sorted(first + second) == list(range(len(first + second)))
    assert not manifest.already_prepared
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    "options",
    [{"val_fraction": 1e-9}, {"val_fraction": 0}, {"max_tokens": 14_000}, {"val_fraction": 1e-9, "max_tokens": 14_000}],
    ids=str,
)
def test_the_splits_are_the_same_after_every_stop(
    options: dict[str, Any], tmp_path: Path, source: Path, tokenizer: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every second block, with a state saved in between."""
    monkeypatch.setattr(assembly, "SAVE_TOKENS", 2_500)
    prepare(str(source), tokenizer, tmp_path / "whole", shard_tokens=3_000, **options)
    manifest, stops = None, 0
    while manifest is None:
        with contextlib.suppress(Stop), stopping(2):
            manifest = prepare(str(source), tokenizer, tmp_path / "out", shard_tokens=3_000, workers=1, **options)
        stops += manifest is None
    assert stops >= 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("method", ["tail", "forget_tail", "cut_files", "flush", "close"])
@pytest.mark.parametrize("before", [True, False])
def test_a_stop_while_the_tail_moves_to_validation(
    method: str, before: bool, tmp_path: Path, source: Path, tokenizer: str, small: None
) -> None:
    """At each call of each step: the tokens are in one of the splits, and the next process completes the move."""
    options: dict[str, Any] = {"val_fraction": 1e-9, "shard_tokens": 300, "max_tokens": 3_000}
    prepare(str(source), tokenizer, tmp_path / "whole", **options)
    real = getattr(SplitWriter, method)
    manifest, number = None, 0
    while manifest is None and number < 40:
        number += 1
        calls: list[int] = []

        def stop(self: SplitWriter, *arguments: Any) -> Any:
            calls.append(1)  # noqa: B023
            if before and len(calls) == number:  # noqa: B023
                raise Stop
            result = real(self, *arguments)
            if len(calls) == number:  # noqa: B023
                raise Stop
            return result

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
            patch.setattr(SplitWriter, method, stop)
            manifest = prepare(str(source), tokenizer, tmp_path / "out", **options)
    assert number > 1
    assert manifest is not None
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_are_refused_in_the_middle_too(
    tmp_path: Path, source: Path, tokenizer: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopping(3), pytest.raises(Stop):
        prepare(str(source), tokenizer, tmp_path / "out", workers=1)
    with pytest.raises(
        DataError, match=r"unfinished preparation .*val_fraction: 0\.005 there, 0\.2 now.*--out for another folder\.$"
    ):
        prepare(str(source), tokenizer, tmp_path / "out", val_fraction=0.2)
    with stopping(-1) as done:
        prepare(str(source), tokenizer, tmp_path / "out", val_fraction=0.2, overwrite=True)
    assert 0 in done
    prepare(str(source), tokenizer, tmp_path / "whole", val_fraction=0.2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_has_no_finished_block_is_in_nobodys_way(
    tmp_path: Path, source: Path, tokenizer: str, small: None
) -> None:
    with stopping(1), pytest.raises(Stop):
        prepare(str(source), tokenizer, tmp_path / "out", workers=1)
    for description in (tmp_path / ".out.partial/work/blocks").glob("*.json"):
        description.unlink()  # as a kill leaves it
    prepare(str(source), tokenizer, tmp_path / "out", val_fraction=0.2)
    assert DataFolder.open(tmp_path / "out").manifest.settings["val_fraction"] == 0.2


def test_an_encoded_block_that_lost_its_end_is_encoded_again(
    tmp_path: Path, source: Path, tokenizer: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "SAVE_TOKENS", 10**9)
    with stopping(5), pytest.raises(Stop):
        prepare(str(source), tokenizer, tmp_path / "out", workers=1)
    encoded = sorted((tmp_path / ".out.partial" / "work" / "blocks").glob("*.train"))
    encoded[1].write_bytes(encoded[1].read_bytes()[:-4])
    encoded[2].with_suffix(".json").write_text("{")
    encoded[3].unlink()
    prepare(str(source), tokenizer, tmp_path / "out")
    prepare(str(source), tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk that holds .* is full .*Free some space. .*Rerun the same command"),
        (errno.EACCES, r"secret: Permission denied.*--out"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failing_disk_is_one_message_and_loses_nothing(
    number: int,
    message: str,
    tmp_path: Path,
    source: Path,
    tokenizer: str,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(str(source), tokenizer, tmp_path / "out", max_tokens=100)
    before = contents(tmp_path / "out")
    with stopping(4, OSError(number, os.strerror(number), "secret")), pytest.raises(DataError, match=message):
        prepare(str(source), tokenizer, tmp_path / "out", overwrite=True, workers=1)
    assert contents(tmp_path / "out") == before
    with stopping(-1) as done:
        prepare(str(source), tokenizer, tmp_path / "out", overwrite=True)
    assert 0 not in done  # --overwrite resumes what --overwrite began
    prepare(str(source), tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path, source: Path, tokenizer: str) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"Permission denied.*--out"):
        prepare(str(source), tokenizer, tmp_path / "closed" / "out")


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path, source: Path, tokenizer: str) -> None:
    from filelock import FileLock

    (tmp_path / ".out.partial").mkdir()
    with FileLock(tmp_path / ".out.partial" / "lock"), pytest.raises(DataError, match="Another `lightlm prepare-data`"):
        prepare(str(source), tokenizer, tmp_path / "out")


BAD = [
    (
        "bad.jsonl",
        b'{"text": "good"}\n{"text": \n{"text": "\xff"}\n{"body": "x"}\n{"text": 5}\n',
        4,
        "line 2: not valid",
    ),
    ("bad.txt", b"not \xff UTF-8", 1, "offset 4"),
    ("bad.parquet", b"no parquet file", 1, "not a readable Parquet"),
    ("bad.jsonl.gz", b"no gzip", 1, "damaged or truncated"),
]


@pytest.mark.parametrize(("name", "content", "count", "message"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_records_stop_the_command_or_are_counted_and_listed(
    name: str, content: bytes, count: int, message: str, tmp_path: Path, tokenizer: str, small: None
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    write_source(folder / "a.jsonl", texts(400))
    write_source(folder / "z.jsonl", texts(50, seed=1))
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(str(folder), tokenizer, tmp_path / "out", workers=1)
    manifest = prepare(str(folder), tokenizer, tmp_path / "out", skip_bad=True)
    assert manifest.dropped == {"unreadable": count}
    assert len(manifest.bad) == count
    assert message in manifest.bad[0]
    opened = DataFolder.open(tmp_path / "out")
    documents = sum(len(list(opened.split(split).documents())) for split in ("train", "val"))
    assert documents == 450 + (name == "bad.jsonl")
    shutil.rmtree(tmp_path / "out")
    again = prepare(str(folder), tokenizer, tmp_path / "out", skip_bad=True)
    assert again == manifest


def test_a_block_stops_when_another_has_failed(
    tmp_path: Path, source: Path, tokenizer: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C does not wait for what is under way."""
    chunks: list[int] = []
    real = encoding_module._BlockEncoder._chunk

    def whole(self: Any, array: Any) -> None:
        chunks.append(1)
        if len(chunks) == 5:
            raise Stop
        if len(chunks) > 5:
            time.sleep(0.5)  # for the main thread to hear of it, however busy the machine is
        real(self, array)

    monkeypatch.setattr(encoding_module._BlockEncoder, "_chunk", whole)
    with pytest.raises(Stop):
        prepare(str(source), tokenizer, tmp_path / "out", workers=1)
    assert len(chunks) <= 6


def test_a_kill_right_after_the_folder_was_put_in_place(
    tmp_path: Path, source: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--overwrite prepares it once more; without it the folder is recognized, and what is left beside it goes."""

    def stop(_: Workspace) -> None:
        raise Stop

    prepare(str(source), tokenizer, tmp_path / "whole")
    for overwrite in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "discard", stop)
            with pytest.raises(Stop):
                prepare(str(source), tokenizer, tmp_path / "out", overwrite=True)
        assert (tmp_path / ".out.partial").is_dir()
        assert prepare(str(source), tokenizer, tmp_path / "out", overwrite=overwrite).already_prepared != overwrite
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert not (tmp_path / ".out.partial").exists()


def test_overwrite_starts_over_what_was_begun_without_it(
    tmp_path: Path, source: Path, tokenizer: str, small: None
) -> None:
    with stopping(5), pytest.raises(Stop):
        prepare(str(source), tokenizer, tmp_path / "out", workers=1)
    with stopping(-1) as done:
        prepare(str(source), tokenizer, tmp_path / "out", overwrite=True)
    assert 0 in done


def test_a_folder_that_another_process_finishes_in_the_last_moment_is_not_replaced(
    tmp_path: Path, source: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the folder and the lock."""
    real = Workspace.locked

    def locked(self: Workspace) -> contextlib.AbstractContextManager[None]:
        monkeypatch.undo()
        prepare(str(source), tokenizer, tmp_path / "out", max_tokens=5_000)
        return real(self)

    monkeypatch.setattr(Workspace, "locked", locked)
    with pytest.raises(DataError, match="prepared with other settings"):
        prepare(str(source), tokenizer, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
    assert prepare(str(source), tokenizer, tmp_path / "out", max_tokens=5_000).already_prepared
