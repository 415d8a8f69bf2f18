"""A real Ray with two workers on this machine; starting it takes most of the time."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightlm.data.prepare import blocks
from lightlm.data.prepare import ray as ray_engine
from lightlm.data.prepare.blocks import Block, DocumentFilter, Job
from lightlm.data.prepare.encoded_block import EncodedBlock
from lightlm.data.prepare.ray import RayEngine, encode_here
from lightlm.data.prepare.run import prepare
from lightlm.data.sources.local import LocalSource
from lightlm.data.tokenizer import train_tokenizer
from lightlm.errors import DataError, UsageError
from tests.corpus import texts
from tests.data.prepare.test_resume import Stop, contents, stopping, write_source

FILES = 8


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray cancels tasks by SIGINT. Its workers inherit an ignored SIGINT, which a background job of a script has.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    train_tokenizer(texts(200), 500).save(tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are blocks of their own. The third has 12 MB, which are written in several steps."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    (tmp_path / "source").mkdir()
    for number in range(FILES):
        documents = texts(100, number) * (300 if number == 2 else 1)
        write_source(tmp_path / "source" / f"{number}.jsonl", documents)
    return tmp_path / "source"


def in_workers(action: Callable[[str], None]) -> DocumentFilter:
    """A filter that leaves nothing out, and in other processes than this one calls `action` with the unit's id.

    Made in a function, so that Ray sends its code along: workers need not find this module.
    """
    here = os.getpid()

    class Filter:
        def __call__(self, unit: str, first: int, array: Any) -> dict[int, str]:
            if os.getpid() != here:
                action(unit)
            return {}

    return Filter()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_worker_killed_in_the_middle_of_a_block_leaves_the_same_bytes(
    tmp_path: Path, source: Path, tokenizer: str
) -> None:
    note, encoded = tmp_path / "killed", tmp_path / ".ray.partial" / "work" / "blocks"

    def kill_once(unit: str) -> None:
        begun = [path.name for path in encoded.glob(f".*-{os.getpid()}.partial") if path.stat().st_size]
        if begun and not note.exists():
            note.write_text(f"{os.getpid()} in {unit}, with {begun[0]}")
            os.kill(os.getpid(), signal.SIGKILL)

    filters = (in_workers(kill_once),)
    prepare(str(source), tokenizer, tmp_path / "threads", filters=filters)
    seen: list[int] = []
    manifest = prepare(
        str(source), tokenizer, tmp_path / "ray", filters=filters, engine=RayEngine(2),
        progress=lambda progress: seen.append(progress.documents),
    )  # fmt: skip
    assert "in 2.jsonl" in note.read_text()
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")
    assert not (tmp_path / ".ray.partial").exists()
    assert seen == sorted(seen)
    assert seen[-1] == sum(shard.documents for shard in manifest.shards)


def test_duplicates_are_left_out_alike(tmp_path: Path, source: Path, tokenizer: str) -> None:
    """Their tables come from the workers, and the choice is made here."""
    for name, engine in (("threads", None), ("ray", RayEngine(2))):
        made = prepare(str(source), tokenizer, tmp_path / name, dedup="exact", engine=engine)
        assert made.dropped["duplicate"] >= 299 * 100  # a file repeats its documents 300 times
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


def test_one_engine_goes_on_where_the_other_stopped(tmp_path: Path, source: Path, tokenizer: str) -> None:
    prepare(str(source), tokenizer, tmp_path / "whole", max_tokens=700_000)

    def stop(progress: Any) -> None:
        if progress.documents > 200:
            raise Stop

    with stopping(2), pytest.raises(Stop):
        prepare(str(source), tokenizer, tmp_path / "ray", workers=1, max_tokens=700_000)
    prepare(str(source), tokenizer, tmp_path / "ray", max_tokens=700_000, engine=RayEngine())
    with pytest.raises(Stop):
        prepare(str(source), tokenizer, tmp_path / "threads", max_tokens=700_000, engine=RayEngine(2), progress=stop)
    with stopping(-1) as done:
        prepare(str(source), tokenizer, tmp_path / "threads", max_tokens=700_000)
    assert not {0, 1} & set(done)
    for name in ("ray", "threads"):
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_a_mistake_in_the_source_is_the_same_message(tmp_path: Path, source: Path, tokenizer: str) -> None:
    (source / "5.jsonl").write_text('{"text": "good"}\n{"text": \n')
    messages = []
    for engine in (None, RayEngine()):
        with pytest.raises(DataError) as raised:
            prepare(str(source), tokenizer, tmp_path / "out", overwrite=True, engine=engine)
        assert type(raised.value) is DataError
        messages.append(str(raised.value))
    assert "line 2" in messages[0]
    assert messages[0] == messages[1]
    for name, engine in (("threads", None), ("ray", RayEngine())):
        prepare(str(source), tokenizer, tmp_path / name, skip_bad=True, engine=engine)
    assert json.loads((tmp_path / "ray" / "manifest.json").read_text())["dropped"] == {"unreadable": 1}
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


def a_job(folder: Path, tokenizer: str, *filters: DocumentFilter) -> Job:
    folder.mkdir()
    return Job(folder, Path(tokenizer), "tokenizers", 0.1, skip_bad=True, filters=filters)


def source_blocks(source: Path) -> list[Block]:
    return list(blocks.blocks_of(LocalSource(source, "text").units()))


def test_closing_stops_the_tasks_and_bounds_are_kept(
    tmp_path: Path, source: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "CANCEL_SECONDS", 60.0)  # a busy machine may take more than 5 s to tell a worker
    begun, stopped = tmp_path / "begun", tmp_path / "stopped"

    def hang(unit: str) -> None:
        if unit.startswith("2"):
            try:
                begun.touch()  # here: the cancellation may come before the next line
                for _ in range(1_000):
                    time.sleep(0.1)
            finally:
                stopped.touch()

    taken: list[int] = []

    def taking() -> Iterator[Block]:
        for block in source_blocks(source):
            taken.append(block.number)
            yield block

    job = a_job(tmp_path / "encoded", tokenizer, in_workers(hang))
    records = RayEngine(2)(job, taking(), lambda *_: None)
    assert [next(records).number, next(records).number] == [0, 1]
    assert len(taken) <= 2 + 4  # given, and twice the two tasks
    while not begun.exists():
        time.sleep(0.01)
    records.close()
    # Ray may count a canceled task as done while its worker still cleans up.
    while not stopped.exists() or list(job.folder.glob(".*")):
        time.sleep(0.01)


def test_a_worker_that_always_dies_is_one_message(
    tmp_path: Path, source: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "RETRIES", 0)
    job = a_job(tmp_path / "encoded", tokenizer, in_workers(lambda unit: os._exit(1)))
    with pytest.raises(DataError, match=r"Ray lost a task .*WorkerCrashedError"):
        list(RayEngine()(job, iter(source_blocks(source)[:1]), lambda *_: None))


def test_nodes_must_see_the_same_files_and_have_the_same_lightlm(
    tmp_path: Path, source: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, block = a_job(tmp_path / "encoded", tokenizer), source_blocks(source)[0]
    with pytest.raises(DataError, match=r"has LightLM .* and this machine 0\.0; install the same version"):
        encode_here(job, block, "0.0")
    (source / "0.jsonl").unlink()  # nothing that --skip-bad could leave out
    with pytest.raises(DataError, match=r"has no .*0\.jsonl.* same path on all nodes"):
        encode_here(job, block, ray_engine.__version__)
    monkeypatch.setattr(ray_engine, "ARRIVAL_SECONDS", 0.0)
    with pytest.raises(DataError, match=r"A Ray task wrote .*00000003\.json, which is not on this machine"):
        ray_engine._expect_files(job.folder, EncodedBlock(number=3, first_unit="a", limit=None))


def test_a_module_that_workers_lack_is_named(tmp_path: Path, source: Path, tokenizer: str) -> None:
    def lack(unit: str) -> None:
        import lightlm_of_no_worker  # noqa: F401

    job = a_job(tmp_path / "encoded", tokenizer, in_workers(lack))
    with pytest.raises(DataError, match=r"no Python module lightlm_of_no_worker\. .*\[ray\]"):
        list(RayEngine()(job, iter(source_blocks(source)[:1]), lambda *_: None))


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    with pytest.raises(UsageError, match=r"--editable \"\.\[ray\]\""):
        RayEngine()


def test_a_cluster_that_does_not_answer_is_one_message(
    tmp_path: Path, source: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = a_job(tmp_path / "encoded", tokenizer)
    with pytest.raises(DataError, match=rf"The Ray cluster at 127\.0\.0\.1:{port} cannot be used: .*refused"):
        next(RayEngine(address=f"127.0.0.1:{port}")(job, iter(source_blocks(source)), lambda *_: None))
