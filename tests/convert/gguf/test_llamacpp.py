"""What llama.cpp makes of the files; skipped where xllamacpp is not installed."""

import math
from dataclasses import replace

import pytest
import torch

from lightlm.convert.folding import as_plain
from lightlm.convert.gguf import verify as verification
from lightlm.convert.gguf.file import export_gguf
from lightlm.convert.gguf.llamacpp import llama_cpp
from lightlm.convert.gguf.verify import verify
from lightlm.errors import ConvertError
from lightlm.generate.engine import generate
from lightlm.generate.sampling import Sampling
from tests.convert.gguf.models import MODELS
from tests.convert.gguf.test_vocabulary import SPLITS, trained
from tests.convert.models import loaded

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed; it is in the extra [gguf]")


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path, tokenizer):
    """Tokens of hard texts, and the distribution of the next token in float32."""
    model = as_plain(loaded(replace(MODELS[name], vocab_size=0), tokenizer))
    export_gguf(model, tmp_path / "model.gguf", "float32")
    # llama.cpp looks GELU up in a table of float16.
    assert verify(model, tmp_path / "model.gguf") < (5e-3 if "gpt2" in name else 1e-4)


def test_composed_characters_are_compared_where_the_tokenizer_composes(tmp_path, tokenizer):
    """Qwen's does, and llama.cpp does not: the file is right for composed text, as the guide says."""
    composing = trained(SPLITS["qwen-2"], lambda content: content.update(normalizer={"type": "NFC"}))
    model = loaded(replace(MODELS["qwen3"], vocab_size=0), composing)
    export_gguf(model, tmp_path / "model.gguf", "float32")
    assert verify(model, tmp_path / "model.gguf") < 1e-4


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_llama_cpp_reads_every_precision(precision, tmp_path, tokenizer):
    model = loaded(replace(MODELS["wide"], vocab_size=0), tokenizer)
    export_gguf(model, tmp_path / "model.gguf", precision)
    assert 0 < verify(model, tmp_path / "model.gguf") < 1


def test_a_wrong_file_is_found(tmp_path, tokenizer, monkeypatch):
    """One with other weights, and one whose weights mean something else to llama.cpp."""
    from lightlm.convert import renaming

    path = tmp_path / "model.gguf"
    model = loaded(replace(MODELS["llama"], vocab_size=0), tokenizer)
    export_gguf(loaded(replace(MODELS["llama"], vocab_size=0, rope_theta=5.0), tokenizer), path, "float32")
    monkeypatch.setattr(verification, "import_gguf", lambda path: model)
    with pytest.raises(ConvertError, match=r"diverge by .* nats, more than rounding"):
        verify(model, path)
    monkeypatch.setattr(renaming, "_to_neighbors", lambda name, tensor, config: tensor)
    with pytest.raises(ConvertError, match=r"blk.0.attn_q.weight is not the model's"):
        verify(model, path)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen3", "moe", "mixtral", "softmax", "deepseek2", "deepseek2_dense"]
)
def test_greedy_continuations_are_equal(name, tmp_path, tokenizer):
    """To the end of the context, in float32; a token that ends a text is never taken by llama.cpp here, nor by us."""
    model = loaded(replace(MODELS[name], vocab_size=0), tokenizer)
    export_gguf(model, tmp_path / "model.gguf", "float32")
    greedy = Sampling(temperature=0.0, logit_bias=((tokenizer.end_of_text_id, -100.0),))
    prompts = [tokenizer.encode(text) for text in ("The cat", "the dog didn't", "3.14!")]
    with llama_cpp(tmp_path / "model.gguf", positions=256) as theirs:
        for prompt in prompts:
            steps = model.model.config.max_seq_len - len(prompt)
            [ours] = generate(model.model, [prompt], steps, greedy)
            assert theirs.continue_greedily(prompt, steps) == ours.ids


def test_eight_bits_cost_less_than_a_percent_of_perplexity(tmp_path, tokenizer):
    """Of a model after a short training, in llama.cpp, against float32 in LightLM."""
    model = loaded(replace(MODELS["wide"], vocab_size=0), tokenizer)
    ids = tokenizer.encode("The cat sat on the mat, and the dog didn't: naïve café")[:40]
    tokens_1T = torch.tensor([ids])
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        logits_TV = model.model(tokens_1T)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits_TV, tokens_1T[0, 1:])
        loss.backward()
        optimizer.step()
    export_gguf(model, tmp_path / "model.gguf", "q8_0")
    with torch.no_grad():
        log_probs_TV = model.model(tokens_1T)[0].log_softmax(-1)
    exact = sum(log_probs_TV[end - 1, ids[end]].item() for end in range(1, len(ids)))
    with llama_cpp(tmp_path / "model.gguf", positions=256) as theirs:
        rounded = sum(theirs.log_prob(ids[:end], ids[end], log_probs_TV.shape[1]) for end in range(1, len(ids)))
    assert math.exp((exact - rounded) / (len(ids) - 1)) == pytest.approx(1, abs=0.01)


def test_a_file_that_is_not_gguf_is_named_with_the_reason(tmp_path):
    """Its last line if llama.cpp, whose log is written by another thread, ends before it gives the reason."""
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with (
        pytest.raises(ConvertError, match=r"llama.cpp cannot load .*model.gguf: \S"),
        llama_cpp(tmp_path / "model.gguf", positions=256),
    ):
        pass
