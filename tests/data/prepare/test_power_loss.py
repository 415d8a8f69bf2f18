"""A machine that goes down keeps what was forced to its disk; of other files nothing but the name may be left."""

import os
from pathlib import Path
from typing import Any

import pytest

from lightlm.data.prepare import assembly, blocks
from lightlm.data.prepare.run import prepare
from lightlm.data.readers import jsonl as readers
from lightlm.data.select.deduplication import Mode
from tests.corpus import texts
from tests.data.prepare.test_resume import Stop, contents, stopping, write_source


@pytest.mark.skipif(os.name == "nt", reason="Windows numbers files otherwise")
@pytest.mark.parametrize("dedup", [None, "exact"])
@pytest.mark.parametrize("val_fraction", [0.02, 1e-9])
def test_what_was_not_forced_to_the_disk_is_made_again(
    dedup: Mode | None, val_fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightlm.data.tokenizer import train_tokenizer

    train_tokenizer(texts(200), 500).save(tmp_path / "tokenizer.json")
    source = write_source(tmp_path / "source.jsonl", texts(600))
    for module in (blocks, readers):
        monkeypatch.setattr(module, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(assembly, "SAVE_TOKENS", 10_000)
    options: dict[str, Any] = {"dedup": dedup, "val_fraction": val_fraction, "workers": 1, "shard_tokens": 15_000}
    prepare(str(source), str(tmp_path / "tokenizer.json"), tmp_path / "whole", **options)
    durable: set[int] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        durable.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with stopping(9 if dedup is None else 18), pytest.raises(Stop):
        prepare(str(source), str(tmp_path / "tokenizer.json"), tmp_path / "out", **options)
    partial = tmp_path / ".out.partial"
    assert (partial / "work" / "state.npz").is_file()
    lost = [path for path in partial.rglob("*") if path.is_file() and path.stat().st_ino not in durable]
    for path in lost:
        path.write_bytes(b"")
    assert lost
    prepare(str(source), str(tmp_path / "tokenizer.json"), tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
