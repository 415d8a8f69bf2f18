"""Files of other programs from strangers: one clear error, nothing executed, through the commands that take MODEL."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from lightlm.convert.load import load_pretrained
from lightlm.errors import ConvertError
from tests.cli.runner import Runner
from tests.convert.programs import test_first, test_litgpt, test_nanochat, test_nanogpt


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def nanogpt(folder, tokenizer):
    test_nanogpt.write_checkpoint(folder / "ckpt.pt")
    tokenizer.save(folder / "tokenizer.json")
    return folder / "ckpt.pt"


def litgpt(folder, tokenizer):
    test_litgpt.write_folder(folder, tokenizer)
    return folder / "lit_model.pth"


def first(folder, tokenizer):
    test_first.write_checkpoint(folder / "model.checkpoint.1.pt", tokenizer)
    return folder / "model.checkpoint.1.pt"


def nanochat(folder, tokenizer):
    test_nanochat.write_checkpoint(folder, test_nanochat.OCTOBER_2025)
    return folder / "model_000100.pt"


WRITERS = [nanogpt, litgpt, first, nanochat]
every = pytest.mark.parametrize("write", WRITERS)


@pytest.fixture
def opened(monkeypatch, capsys):
    """Check that the commands that take MODEL refuse a path with one message."""
    lightlm = Runner(monkeypatch, capsys)

    def check(path, *parts, commands=(("convert",), ("generate", "a", "--checkpoint"))):
        for command in commands:
            outcome = lightlm(*command, str(path))
            flat = " ".join(outcome.stderr.split())
            assert outcome.code == 1, outcome
            assert flat.count("Error:") == 1, flat
            assert "Traceback" not in flat
            for part in parts:
                assert part in flat, (part, flat)

    return check


@every
def test_a_pickle_that_would_run_code(write, tokenizer, tmp_path, opened):
    path, marker = write(tmp_path, tokenizer), tmp_path / "ran"
    content = torch.load(path)
    content["config"] = Attack(marker)
    torch.save(content, path)
    opened(path, f"{path.name} is refused: reading it would call", "which could be any code")
    assert not marker.exists()


@every
def test_files_that_end_early(write, tokenizer, tmp_path, opened):
    path = write(tmp_path, tokenizer)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    opened(path, f"{path.name} cannot be read: it is damaged or cut off", commands=[("convert",)])


@every
def test_git_lfs_pointers(write, tokenizer, tmp_path, opened):
    path = write(tmp_path, tokenizer)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    opened(path, f"{path.name} is a Git LFS pointer", commands=[("convert",)])


def test_an_archive_that_unpacks_to_more_than_it_is(tokenizer, tmp_path, opened):
    path = nanogpt(tmp_path, tokenizer)
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
        archive.writestr("archive/data/zeros", bytes(10_000_000), zipfile.ZIP_DEFLATED)
    opened(path, "its contents are compressed", commands=[("convert",)])


@pytest.mark.parametrize("write", WRITERS[:3])
def test_tensors_that_do_not_fit(write, tokenizer, tmp_path):
    path = write(tmp_path, tokenizer)
    whole = torch.load(path)
    names = list(whole["model"])
    matrix = next(
        name for name in names if "0.attn.c_proj" in name or "0.attn.proj" in name or "0.attention.wo" in name
    )

    def changed(**changes):
        state = whole["model"] | changes
        torch.save(whole | {"model": {name: tensor for name, tensor in state.items() if tensor is not None}}, path)

    for changes, message in (
        ({matrix: torch.ones(3, 5)}, "shape|3, 5"),
        ({matrix: None}, "is missing"),
        ({"extra.weight": torch.ones(2)}, "extra.weight belongs to no part of"),
        ({matrix: torch.ones(32, 32, dtype=torch.int8)}, "has elements of int8, not floats"),
        ({matrix: torch.ones(1).expand(1 << 40)}, "fewer bytes than elements|damaged|cut off"),
        ({matrix: torch.ones(32, 32).to_sparse()}, "is not a plain tensor|Sparse"),
        ({matrix: torch.empty(32, 32, device="meta")}, "plain tensor|meta|damaged"),
        ({matrix: "text"}, "not a named tensor"),
    ):
        changed(**changes)
        with pytest.raises(Exception, match=message) as caught:
            load_pretrained(path)
        assert type(caught.value).__module__ == "lightlm.errors", caught.value
    for model in ([], {}, None, {1: torch.ones(2)}):
        torch.save(whole | {"model": model}, path)
        with pytest.raises(Exception, match=r"no dictionary of tensors|named tensor|recognizes") as caught:
            load_pretrained(path)
        assert type(caught.value).__module__ == "lightlm.errors", caught.value


def test_a_meta_pickle_that_would_run_code(tmp_path, tokenizer, opened):
    path, marker = nanogpt(tmp_path, tokenizer), tmp_path / "ran"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Attack(marker), "itos": {}}))
    opened(path, "meta.pkl is refused: reading it would call", "write a tokenizer.json into the folder instead")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x80", pickle.dumps([1, 2]), pickle.dumps({"stoi": {"ab": 0}}), pickle.dumps({"stoi": {"a": 1}}),
        pickle.dumps({"stoi": {"a": 0, "b": 0}}), pickle.dumps({"stoi": {}}), pickle.dumps({"stoi": {"a": 0.0}}),
    ],
)  # fmt: skip
def test_meta_pickles_that_say_nothing(content, tokenizer, tmp_path):
    path = nanogpt(tmp_path, tokenizer)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ConvertError, match=r"meta\.pkl (does not say|is not a pickle)"):
        load_pretrained(path)


def test_a_data_set_named_as_a_path_is_not_followed(tokenizer, tmp_path, monkeypatch):
    """The name is in the checkpoint, which a stranger wrote."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    test_nanogpt.write_checkpoint(folder / "ckpt.pt", data_set="../secret")
    test_nanogpt.write_characters(tmp_path / "secret" / "meta.pkl", [chr(200 + index) for index in range(300)])
    with pytest.raises(ConvertError, match="holds no tokenizer"):
        load_pretrained(folder)
