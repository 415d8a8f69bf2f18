"""Headers of GGUF files: what `gguf` writes is read, and no bytes do worse than one clear error."""

import contextlib
import struct
import sys
import tracemalloc
from dataclasses import replace

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightlm.convert.formats import format_of, reader_of
from lightlm.convert.gguf.file import export_gguf, import_gguf
from lightlm.convert.gguf.header import read_header
from lightlm.convert.gguf.shape import read_shape
from lightlm.errors import CheckpointError, ConvertError
from tests.convert.gguf.models import MODELS
from tests.convert.models import loaded

Type = gguf.GGUFValueType
SCALARS = {
    Type.UINT8: st.integers(0, 2**8 - 1),
    Type.INT16: st.integers(-(2**15), 2**15 - 1),
    Type.UINT32: st.integers(0, 2**32 - 1),
    Type.INT64: st.integers(-(2**63), 2**63 - 1),
    Type.FLOAT32: st.floats(width=32, allow_nan=False),
    Type.FLOAT64: st.floats(allow_nan=False),
    Type.BOOL: st.booleans(),
    Type.STRING: st.text(min_size=1, max_size=20),
}
VALUES = st.one_of(
    *(st.tuples(st.just(kind), values) for kind, values in SCALARS.items()),
    st.tuples(st.just(Type.ARRAY), st.lists(st.text(max_size=9), min_size=1, max_size=4)),
    st.tuples(st.just(Type.ARRAY), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4)),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.text(min_size=1, max_size=12), VALUES, max_size=6),
    shapes=st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(1, 4), min_size=1, max_size=4)),
)
def test_what_the_gguf_package_writes_is_read(values, shapes, tmp_path):
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "test")
    for key, (kind, value) in values.items():
        writer.add_key_value(f"test.{key}", value, kind)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    for key, (_, value) in values.items():
        read = header.metadata[f"test.{key}"]
        assert (read.tolist() if isinstance(read, np.ndarray) else read) == value
    assert {name: list(place.shape) for name, place in header.tensors.items()} == shapes


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer):
    """The bytes of a small file, and where its tensors begin."""
    path = tmp_path_factory.mktemp("good") / "model.gguf"
    export_gguf(loaded(replace(MODELS["llama"], vocab_size=0), tokenizer), path, "float32")
    header = read_header(path)
    return path.read_bytes(), min(place.offset for place in header.tensors.values())


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_give_one_error(good, tmp_path, data):
    """Bytes of the header replaced, or the file cut: a model is read, or one error of ours says why not."""
    content, start = good
    changed = bytearray(content)
    for place in data.draw(st.lists(st.integers(0, start - 1), min_size=1, max_size=4)):
        size = data.draw(st.sampled_from([1, 4, 8]))
        changed[place : place + size] = data.draw(st.binary(min_size=size, max_size=size))
    cut = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    (tmp_path / "file.gguf").write_bytes(changed[:cut])
    message = "file.gguf"
    with contextlib.suppress(ConvertError, CheckpointError):
        try:
            import_gguf(tmp_path / "file.gguf")
        except (ConvertError, CheckpointError) as error:
            message = str(error)
            raise
    assert "file.gguf" in message
    assert len(message) < 2000


def header_bytes(values=b"", num_values=0, tensors=b"", num_tensors=0, magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, num_tensors, num_values) + values + tensors


def value(kind, data, key=b"key"):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + data


def tensor(name=b"t", shape=(4,), kind=0, offset=0, dimensions=None):
    count = len(shape) if dimensions is None else dimensions
    packed = struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", count, *shape)
    return packed + struct.pack("<IQ", kind, offset)


HUGE = 1 << 60
HOSTILE = {
    "empty": (b"", "says that 4 bytes follow"),
    "only magic": (b"GGUF", "says that 4 bytes follow"),
    "another format": (b"PK\3\4" + bytes(100), "does not start with GGUF"),
    "version 1": (header_bytes(version=1), "version is 1, not 2 or 3"),
    "big-endian": (header_bytes(version=3 << 24), "big-endian"),
    "many keys": (header_bytes(num_values=HUGE), "1,152,921,504,606,846,976 keys follow"),
    "many tensors": (header_bytes(num_tensors=HUGE), "tensors follow"),
    "long key": (header_bytes(struct.pack("<Q", HUGE) + bytes(50), 1), "bytes follow"),
    "long text": (header_bytes(value(8, struct.pack("<Q", HUGE)) + bytes(50), 1), "bytes follow"),
    "long array": (header_bytes(value(9, struct.pack("<IQ", 0, HUGE)) + bytes(50), 1), "elements of key follow"),
    "long array of texts": (header_bytes(value(9, struct.pack("<IQ", 8, HUGE)) + bytes(50), 1), "elements of key"),
    "nested array": (header_bytes(value(9, struct.pack("<IQ", 9, 1)) + bytes(50), 1), "elements of the type 9"),
    "unknown type": (header_bytes(value(77, bytes(8)), 1), "unknown type 77"),
    "key twice": (header_bytes(value(0, b"\1") * 2, 2), "'key' occurs twice"),
    "key not UTF-8": (header_bytes(value(0, b"\1", b"\xff\xfe"), 1), "not UTF-8"),
    "alignment 0": (header_bytes(value(4, bytes(4), b"general.alignment"), 1), "general.alignment is 0"),
    "alignment 3": (header_bytes(value(4, b"\3\0\0\0", b"general.alignment"), 1), "general.alignment is 3"),
    "alignment text": (header_bytes(value(8, bytes(8), b"general.alignment"), 1), "alignment is ''"),
    "no dimensions": (header_bytes(tensors=tensor(shape=()), num_tensors=1), "has 0 dimensions"),
    "many dimensions": (header_bytes(tensors=tensor(dimensions=2**31) + bytes(90), num_tensors=1), "dimensions"),
    "size 0": (header_bytes(tensors=tensor(shape=(0, 4)), num_tensors=1), r"the shape \(4, 0\)"),
    "huge tensor": (header_bytes(tensors=tensor(shape=(2**30, 2**30)), num_tensors=1), "bytes after the file"),
    "size beyond all": (header_bytes(tensors=tensor(shape=(HUGE, HUGE)), num_tensors=1), "the shape"),
    "far tensor": (header_bytes(tensors=tensor(offset=HUGE), num_tensors=1), "bytes after the file"),
    "half a block": (header_bytes(tensors=tensor(shape=(31,), kind=8) + bytes(999), num_tensors=1), "in blocks of 32"),
    "unknown tensor type": (header_bytes(tensors=tensor(kind=999) + bytes(99), num_tensors=1), "unknown type 999"),
    "tensor twice": (header_bytes(tensors=tensor() * 2 + bytes(99), num_tensors=2), "'t' occurs twice"),
    "overlap": (header_bytes(tensors=tensor(b"a") + tensor(b"b", offset=8) + bytes(99), num_tensors=2), "overlaps"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name, tmp_path):
    data, message = HOSTILE[name]
    (tmp_path / "file.gguf").write_bytes(data)
    with pytest.raises(ConvertError, match=message):
        read_header(tmp_path / "file.gguf")


ABSURD = st.sampled_from([0, 1, 2, 31, 32, *(2**bits + step for bits in (16, 31, 32, 53, 63) for step in (-1, 0, 1))])
KINDS = st.one_of(st.integers(0, 40), st.sampled_from([255, 2**31, 2**32 - 1]))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.tuples(ABSURD, ABSURD),
    version=st.sampled_from([2, 3]),
    entries=st.lists(st.tuples(ABSURD, KINDS, KINDS, ABSURD), max_size=4),
    tensors=st.lists(st.tuples(st.lists(ABSURD, max_size=5), KINDS, ABSURD), max_size=3),
    filling=st.integers(0, 200),
)
def test_absurd_numbers_give_one_error_and_take_little_memory(counts, version, entries, tensors, filling, tmp_path):
    """Counts, lengths, types, sizes and offsets up to the largest, each where a reader expects it."""
    values = b"".join(
        value(kind, struct.pack("<IQ", inner, length), struct.pack("<Q", number))
        for number, kind, inner, length in entries
    )
    places = b"".join(tensor(bytes([97 + n]), shape, kind, offset) for n, (shape, kind, offset) in enumerate(tensors))
    path = tmp_path / "file.gguf"
    for num_values, num_tensors in (counts, (len(entries), len(tensors))):
        path.write_bytes(header_bytes(values, num_values, places, num_tensors, version=version) + bytes(filling))
        tracemalloc.start()
        with contextlib.suppress(ConvertError):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_large_header_of_lies_takes_little_memory(tmp_path):
    """A sparse file of 1 TB, whose header claims arrays as long."""
    import resource

    path = tmp_path / "file.gguf"
    path.write_bytes(header_bytes(value(9, struct.pack("<IQ", 8, 1 << 36)), 1))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConvertError, match="its header has more than 64 MiB"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


SHAPES_THAT_LIE = [
    ({"llama.block_count": 2**31 - 1}, "2,147,483,647 blocks, but"),
    ({"llama.block_count": 3}, "blk.2.attn_norm.weight is missing"),
    ({"llama.block_count": 1}, "blk.1.attn_k.weight belongs to no part of llama"),
    ({"llama.embedding_length": 64}, r"attention_norm.weight has shape \(32,\), the model needs \(64,\)"),
    ({"llama.embedding_length": 2**31 - 1}, "it says 2,147,483,647, but no tensor has more than"),
    ({"llama.attention.head_count": 0}, "num_heads: must be at least 1"),
    ({"llama.attention.head_count": 7}, "num_kv_heads: 2 does not divide num_heads 7"),
    ({"llama.attention.head_count": "four"}, "is 'four', which is not a int"),
    ({"llama.attention.layer_norm_rms_epsilon": "small"}, "is 'small', which is not a float"),
    ({"llama.rope.freq_base": float("nan")}, "rope_theta: must be a number above 0"),
    ({"llama.context_length": None}, "llama.context_length is missing"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', must be 'none'"),
    ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window is '8', which it does not compute"),
    ({"llama.rope.dimension_count": 4}, r"rope.dimension_count is 4, must be llama.attention.key_length, 8"),
    ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv is .*2 1.*, which it does not compute"),
    ({"tokenizer.ggml.merges": [1, 2]}, "has no array of texts tokenizer.ggml.merges"),
    ({"tokenizer.ggml.token_type": ["a"]}, "has no array of numbers tokenizer.ggml.token_type"),
    ({"llama.expert_count": 4}, "belongs to no part of llama|is missing"),
    ({"general.architecture": "mamba"}, "of the architecture 'mamba'; LightLM reads deepseek2, glm4moe, gpt2, llama"),
    ({"general.architecture": 5}, "is '5', which is not a str"),
    ({"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind 'bert'; LightLM reads gpt2 and llama"),
    ({"tokenizer.ggml.pre": "tekken"}, "splits text as 'tekken'; LightLM reads"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, "has 2 tokens and"),
    ({"tokenizer.ggml.merges": ["a"]}, "not a tokenizer.json"),
    ({"tokenizer.ggml.eos_token_id": 2**31}, "eos_token_id is 2147483648, the token table has"),
    ({"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.bos_token_id": None}, "no token that ends a text"),
]


@pytest.mark.parametrize(("changes", "message"), SHAPES_THAT_LIE)
def test_metadata_that_lies(changes, message, good, tmp_path):
    """Written by the `gguf` package with some values changed or, where None, left out."""
    (tmp_path / "good.gguf").write_bytes(good[0])
    header = read_header(tmp_path / "good.gguf")
    path = tmp_path / "file.gguf"
    metadata = header.metadata | changes
    writer = gguf.GGUFWriter(path, "llama")
    for key, entry in metadata.items():
        if entry is not None:
            _add(writer, key, entry.tolist() if isinstance(entry, np.ndarray) else entry)
    for tensor in gguf.GGUFReader(tmp_path / "good.gguf").tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises((ConvertError, CheckpointError), match=message):
        reader_of(path).read(path)


def _add(writer, key, entry):
    kinds = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING, list: Type.ARRAY}
    writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(entry, kinds[type(entry)])


def test_files_are_told_by_their_first_bytes(good, tmp_path):
    path = tmp_path / "without-ending"
    path.write_bytes(good[0])
    assert format_of(path).name == "gguf"
    assert read_shape(read_header(path))[0] == "llama"
    (tmp_path / "other.gguf").write_bytes(b"PK")
    assert format_of(tmp_path / "other.gguf") is None
    assert format_of(tmp_path / "missing.gguf") is None
