"""What llama.cpp makes of the files; skipped where xllamacpp is not installed."""

from dataclasses import replace

import pytest

from lightlm.convert.folding import as_plain
from lightlm.convert.gguf import verify as verification
from lightlm.convert.gguf.file import export_gguf
from lightlm.convert.gguf.verify import verify
from lightlm.errors import ConvertError
from tests.convert.gguf.models import MODELS
from tests.convert.models import loaded

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'lightlm[gguf]'")


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path, tokenizer):
    """Tokens of hard texts, and the distribution of the next token in float32."""
    model = as_plain(loaded(replace(MODELS[name], vocab_size=0), tokenizer))
    export_gguf(model, tmp_path / "model.gguf", "float32")
    # llama.cpp looks GELU up in a table of float16.
    assert verify(model, tmp_path / "model.gguf") < (5e-3 if "gpt2" in name else 1e-4)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_llama_cpp_reads_every_precision(precision, tmp_path, tokenizer):
    model = loaded(replace(MODELS["wide"], vocab_size=0), tokenizer)
    export_gguf(model, tmp_path / "model.gguf", precision)
    assert 0 < verify(model, tmp_path / "model.gguf") < 1


def test_a_wrong_file_is_found(tmp_path, tokenizer, monkeypatch):
    """One with other weights, and one whose weights mean something else to llama.cpp."""
    from lightlm.convert.gguf import tensors

    path = tmp_path / "model.gguf"
    model = loaded(replace(MODELS["llama"], vocab_size=0), tokenizer)
    export_gguf(loaded(replace(MODELS["llama"], vocab_size=0, rope_theta=5.0), tokenizer), path, "float32")
    monkeypatch.setattr(verification, "import_gguf", lambda path: model)
    with pytest.raises(ConvertError, match=r"diverge by .* nats, more than rounding"):
        verify(model, path)
    monkeypatch.setattr(tensors, "NEIGHBORING_PAIRS", ())
    with pytest.raises(ConvertError, match=r"blk.0.attn_q.weight is not the model's"):
        verify(model, path)
