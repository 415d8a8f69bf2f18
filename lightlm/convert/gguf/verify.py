"""Compare a GGUF file with the model that it was made of, by running llama.cpp."""

import unicodedata
from pathlib import Path

import gguf
import torch

from lightlm.checkpoint import LoadedModel, clean_state
from lightlm.convert.gguf.file import import_gguf
from lightlm.convert.gguf.header import read_header
from lightlm.convert.gguf.layouts import gguf_layout
from lightlm.convert.gguf.llamacpp import llama_cpp
from lightlm.convert.gguf.tensors import gguf_tensors, read_tensors
from lightlm.convert.samples import TEXTS
from lightlm.errors import ConvertError

_PROMPTS = 5  # whose next tokens are compared
# The largest accepted divergence, in nats, of the next token's distribution: the median over the prompts, since two
# experts that tie may change one of them. A float32 file is computed in float32. llama.cpp rounds the other operand of
# its products too: to float16 or bfloat16, and to 8 bits beside quantized weights. Measured on SmolLM2-135M, at most:
# 1e-7, 3e-6, 3e-4, and 1e-2 for q8_0.
_DIVERGENCE = {"F32": 5e-6, "F16": 1e-4, "BF16": 3e-3}
_QUANTIZED_DIVERGENCE = 0.1
# The largest accepted relative error of a tensor (the root of the mean square) against the model's own.
_ROUNDING = {
    "F32": 0.0,
    "F16": 1e-3,
    "BF16": 5e-3,
    "Q8_0": 0.01,
    "Q5_1": 0.06,
    "Q5_0": 0.06,
    "Q4_1": 0.12,
    "Q4_0": 0.15,
}


@torch.no_grad()
def verify(loaded: LoadedModel, path: Path) -> float:
    """Return the largest difference of log-probabilities between llama.cpp and LightLM, which run the same file.

    Raises:
        ConvertError: the file holds other weights than the model, or llama.cpp reads other tokens from text or computes
            something else.
    """
    _check_weights(loaded, path)
    ours = import_gguf(path)
    matrix = read_header(path).tensors["blk.0.attn_output.weight"]
    kind = gguf.GGMLQuantizationType(matrix.type).name
    limit = ours.model.config.max_seq_len
    with llama_cpp(path, positions=max(limit, 256)) as theirs:
        # llama.cpp does not compose characters.
        composes = loaded.tokenizer.content.get("normalizer") == {"type": "NFC"}
        for text in (unicodedata.normalize("NFC", each) if composes else each for each in TEXTS):
            expected = [*loaded.tokenizer.context_ids, *loaded.tokenizer.encode(text)]
            if (found := theirs.tokenize(text)) != expected:
                raise ConvertError(f"{path}: llama.cpp encodes {text!r} as {found}, LightLM as {expected}")
        largest, divergences = 0.0, []
        for text in TEXTS[:_PROMPTS]:
            ids = loaded.tokenizer.encode(text)[: min(limit, 32)]
            ours_V = ours.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            theirs_V = torch.tensor(theirs.next_log_probs(ids, len(ours_V))).log_softmax(-1)
            largest = max(largest, (ours_V - theirs_V).abs().max().item())
            divergences.append((ours_V.exp() * (ours_V - theirs_V)).sum().item())
    divergence = sorted(divergences)[len(divergences) // 2]
    if not divergence <= (tolerance := _DIVERGENCE.get(kind, _QUANTIZED_DIVERGENCE)):
        raise ConvertError(
            f"{path} does not compute what {loaded.path} does: the next tokens' distributions of llama.cpp and LightLM "
            f"diverge by {divergence:.1e} nats, more than rounding ({tolerance:.0e}); do not use the conversion, and "
            "report this"
        )
    return largest


def _check_weights(loaded: LoadedModel, path: Path) -> None:
    """Raise ConvertError if a tensor of the file is not the model's, rounded."""
    expected = gguf_tensors(
        gguf_layout(loaded.model.config)[0], loaded.model.config, clean_state(loaded.model.state_dict())
    )
    header = read_header(path)
    for name, tensor in read_tensors(header):
        wanted = expected[name].cpu()
        limit = _ROUNDING.get(gguf.GGMLQuantizationType(header.tensors[name].type).name, 0.2)
        if not (tensor - wanted).norm() <= limit * wanted.norm():
            raise ConvertError(f"{path}: {name} is not the model's; do not use the conversion, and report this")
