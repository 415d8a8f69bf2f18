"""Files of torch.save from strangers: tensors are read, and nothing is run."""

import collections
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from lightlm.convert.pickles import read_pickle
from lightlm.errors import ConvertError, DataError


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_values(zipped, tmp_path):
    path = tmp_path / "a.bin"
    given = collections.OrderedDict(w=torch.arange(6.0).view(2, 3), nested={"b": [torch.ones(2).bfloat16(), 3, "x"]})
    torch.save(given, path, _use_new_zipfile_serialization=zipped)
    read = read_pickle(path)
    assert torch.equal(read["w"], given["w"])
    assert read["nested"]["b"][1:] == [3, "x"]


@pytest.mark.parametrize("write", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code(write, tmp_path):
    path, marker = tmp_path / "a.bin", tmp_path / "ran"
    content = {"w": torch.ones(2), "x": Attack(marker)}
    if write == "plain pickle":
        path.write_bytes(pickle.dumps(Attack(marker), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(ConvertError, match=r"a\.bin is refused: reading it would call \S+, which could be any code"):
        read_pickle(path)
    assert not marker.exists()


def test_damaged_files(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"w": torch.randn(1000)}, path)
    whole = path.read_bytes()
    for damaged in (b"", b"not a zip file", whole[:-100], whole[: len(whole) // 2], pickle.dumps([1], protocol=0)[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(ConvertError, match=r"a\.bin cannot be read: it is damaged or cut off"):
            read_pickle(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        read_pickle(path)
    with pytest.raises(ConvertError, match="cannot be read"):
        read_pickle(tmp_path / "none.bin")


def test_small_files_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"w": torch.ones(1).expand(1 << 20, 1 << 20)}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(ConvertError, match=r"shape \(1048576, 1048576\) has fewer bytes"):
        read_pickle(path)
    torch.save({"w": torch.empty(1 << 20, device="meta")}, path)
    with pytest.raises(ConvertError, match=r"shape \(1048576,\) has fewer bytes"):
        read_pickle(path)
    torch.save({"w": torch.zeros(1 << 20)}, plain := io.BytesIO())
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ConvertError, match="its contents are compressed"):
        read_pickle(path)


def test_containers_that_hold_themselves(tmp_path):
    path, inner = tmp_path / "a.bin", []
    for _ in range(60):
        inner = [inner, inner]  # 2^60 ways to its end
    torch.save({"w": inner}, path)
    assert isinstance(read_pickle(path)["w"], list)
