"""Every architecture through every format, and what no format may do: lose an earlier export, or fail unclearly."""

import contextlib
import importlib.util
import os
import signal
from dataclasses import replace

import pytest
import torch

from lightlm import files
from lightlm.checkpoint import clean_state, save_model
from lightlm.convert import torch_export
from lightlm.convert.folding import as_plain
from lightlm.convert.formats import FORMATS, convert_model, format_of, read_model
from lightlm.convert.load import load_pretrained
from lightlm.convert.samples import TEXTS, sample_tokens
from lightlm.errors import ConvertError, DiskFullError, LightLMError
from tests.convert.gguf.models import MODELS
from tests.convert.models import loaded
from tests.shapes import SHAPES

ARCHITECTURES = {**SHAPES, **MODELS}
WRITTEN = [name for name, known in FORMATS.items() if known.writes]
BOTH_WAYS = [name for name in WRITTEN if FORMATS[name].reads]
DTYPES = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.05}  # largest difference of logits that rounding makes
CASES = [(name, dtype) for name in WRITTEN for dtype in (*DTYPES, *FORMATS[name].quantizations)]


@pytest.fixture(scope="module", autouse=True)
def one_export():
    """Trace the trained model once in each precision: torch.export takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        trace, programs = torch_export.exported, {}

        def exported(model):
            key = model.config, model.head_weight.dtype
            if key not in programs:
                programs[key] = trace(model)
            return programs[key]

        patch.setattr(torch_export, "exported", exported)
        yield


def need(*packages):
    for package in filter(None, packages):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; it is in the extra [dev]")


def place(name, folder):
    """Where a format writes, in a folder."""
    return folder / f"model{FORMATS[name].suffix}"


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A checkpoint with scales to fold, after a short training on the texts that conversions are compared on."""
    shape = replace(SHAPES["scaled"], vocab_size=0, hidden_size=64, head_dim=16, intermediate_size=96)
    model = loaded(shape, tokenizer)
    tokens_BT = sample_tokens(model)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        logits_BTV = model.model(tokens_BT[:, :-1])
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    save_model(folder, model.model.eval(), tokenizer)
    return folder


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back_is_identical(architecture, name, tokenizer, tmp_path):
    """Each bit of the weights, the shape and the tokenizer; or the field in the way is named."""
    known, model = FORMATS[name], loaded(replace(ARCHITECTURES[architecture], vocab_size=0), tokenizer)
    need(known.package)
    if refusal := known.refusal(model.model.config):
        assert "(" in refusal
        assert known.target(model.model.config) == ""
        with pytest.raises(ConvertError):
            known.write(as_plain(model), place(name, tmp_path), torch.float32)
        assert list(tmp_path.iterdir()) == []
        return
    plain = as_plain(model) if known.folds else model
    known.write(plain, place(name, tmp_path), torch.float32)
    assert format_of(place(name, tmp_path)) is known
    back = known.read(place(name, tmp_path))
    expected = plain.model.config
    if known.folds:  # where blocks repeat, layers are written
        layers = {"num_layers": expected.depth, "first_k_dense": expected.first_k_dense * expected.layer_sharing}
        expected = replace(expected, **layers, layer_sharing=1)
    same = ("num_layers", "hidden_size", "num_kv_heads", "head_dim", "qk_norm", "max_seq_len", "tie_embeddings")
    assert all(getattr(back.model.config, each) == getattr(expected, each) for each in same)
    state, ours = clean_state(back.model.state_dict()), clean_state(plain.model.state_dict())
    for key, tensor in state.items():
        block = key.split(".")
        if block[0] == "blocks" and known.folds:
            block[1] = str(int(block[1]) // plain.model.config.layer_sharing)
        # A class that always has biases stores those of a model without as zeros.
        expected = ours.get(".".join(block), torch.zeros_like(tensor) if key.endswith(".bias") else None)
        assert expected is not None, key
        assert torch.equal(tensor, expected), key
    assert all(back.tokenizer.encode(text) == tokenizer.encode(text) for text in TEXTS)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_trained_model_in_every_precision(name, precision, trained, tmp_path):
    """--verify runs the format's own software where it is installed; what is read back differs only by rounding."""
    known = FORMATS[name]
    need(known.package, known.verifier)
    quantize = precision if precision in known.quantizations else ""
    dtype = torch.float32 if quantize else getattr(torch, precision)
    out = place(name, tmp_path)
    facts = convert_model(trained, FORMATS["lightlm"], out, known, dtype, quantize=quantize, verify=True)
    assert facts["class"]
    if precision == "float32":
        assert facts["max_logit_difference"] < 1e-3
    if known.reads:
        source = read_model(trained)
        with torch.no_grad():
            ours_BTV, theirs_BTV = (each.model(sample_tokens(source)) for each in (source, read_model(out)))
        if quantize:
            log_BTV = ours_BTV.log_softmax(-1)
            assert (log_BTV.exp() * (log_BTV - theirs_BTV.log_softmax(-1))).sum(-1).mean() < 0.1  # nats
        else:
            assert (ours_BTV - theirs_BTV).abs().max() < DTYPES[precision]


@pytest.mark.parametrize("name", WRITTEN)
def test_float16_overflow_names_the_tensor(name, tokenizer, tmp_path):
    need(FORMATS[name].package)
    model = loaded(replace(SHAPES["llama"], vocab_size=0), tokenizer)
    with torch.no_grad():
        model.model.blocks[1].mlp.up_proj.weight[3, 5] = 1e5
    save_model(tmp_path / "source", model.model, tokenizer)
    for quantize in ("", *FORMATS[name].quantizations[:1]):
        dtype = torch.float32 if quantize else torch.float16  # scales of quantized blocks are float16
        with pytest.raises(ConvertError, match=r"blocks\.1\.mlp\.up_proj\.weight has weights up to 1e\+05"):
            convert_model(
                tmp_path / "source", FORMATS["lightlm"], place(name, tmp_path), FORMATS[name], dtype, quantize=quantize
            )
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def write(name, source, out):
    convert_model(source, FORMATS["lightlm"], out, FORMATS[name], torch.float32)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversion_that_stops_keeps_the_earlier_one(name, trained, tmp_path, monkeypatch):
    """By Ctrl-C or a full disk, once everything is written but nothing is renamed; nothing else is left."""
    need(FORMATS[name].package)
    out = place(name, tmp_path)
    write(name, trained, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), DiskFullError)):

        def stop(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(files, "sync_file", stop)
            with pytest.raises(raised):
                write(name, trained, out)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_killed_conversion_leaves_nothing_after_the_next(name, trained, tmp_path):
    need(FORMATS[name].package)
    out = place(name, tmp_path)
    write(name, trained, out)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    child = os.fork()
    if child == 0:
        files.sync_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            write(name, trained, out)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {path: path.stat().st_size for path in before} == before
    assert len(list(tmp_path.rglob("*"))) > len(before)
    write(name, trained, out)
    assert {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} == before


def _cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 538090408\n"
DAMAGES = {
    "cut off": (_cut, None),
    "empty": (lambda path: path.write_bytes(b""), None),
    "a text": (lambda path: path.write_text("404: Not Found\n" * 40), None),
    "missing": (lambda path: path.unlink(), None),
    "a Git LFS pointer": (lambda path: path.write_bytes(POINTER), "Git LFS"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_damaged_weights_are_one_clear_error(name, damage, trained, tmp_path):
    """It names the file or folder, in one line; and Git LFS where that is the reason."""
    need(FORMATS[name].package)
    out = place(name, tmp_path)
    write(name, trained, out)
    weights = out if out.is_file() else out / "model.safetensors"
    change, reason = DAMAGES[damage]
    change(weights)
    with pytest.raises(LightLMError, match=reason) as caught:
        load_pretrained(out)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
