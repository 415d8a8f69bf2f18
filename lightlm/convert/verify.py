"""Whether a Hugging Face folder and one of our models compute the same, by transformers' own code."""

import copy
from pathlib import Path
from typing import Any

import torch

from lightlm.checkpoint import LoadedModel
from lightlm.errors import ConvertError

# On logits in float32, where the two can differ in the order of sums alone. Measured on one CPU: 0 for SmolLM2-135M.
TOLERANCE = 1e-4
SAMPLE = "Hello, I am a language model: naïve café, 3.14,\n\tdon't stop.  The end"


def require_transformers() -> Any:
    """The transformers module.

    Raises:
        ConvertError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ConvertError(
            '--verify compares with transformers, which is not installed: pip install "lightlm[hf]"'
        ) from None
    return transformers


@torch.no_grad()
def largest_difference(loaded: LoadedModel, folder: Path, dtype: torch.dtype) -> float:
    """The largest absolute difference of logits between our model and a Hugging Face folder's.

    Both models' weights are rounded to `dtype` and then run in float32 on the same tokens, so a conversion to
    bfloat16 meets the same tolerance: what rounding itself costs is not counted.

    Raises:
        ConvertError: transformers is missing or cannot load the folder.
    """
    transformers = require_transformers()
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConvertError(f"transformers {transformers.__version__} cannot load {folder}: {error}") from error
    ours = copy.deepcopy(loaded.model).cpu()
    length = min(128, ours.config.max_seq_len)
    tokens_BT = torch.randint(loaded.tokenizer.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    # Parameters alone: `.to` would round their table of rotary frequencies too, which no file holds.
    for parameter in (*ours.parameters(), *theirs.parameters()):
        parameter.data = parameter.data.to(dtype).float()
    logits_BTV, their_logits_BTV = ours(tokens_BT), theirs.eval()(tokens_BT).logits
    return (logits_BTV - their_logits_BTV).abs().max().item()


def check_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    """Compare the ids of a sample text.

    Raises:
        ConvertError: `AutoTokenizer` makes other ids of it than our tokenizer.
    """
    theirs = require_transformers().AutoTokenizer.from_pretrained(folder)(SAMPLE, verbose=False)["input_ids"]
    ours = list(loaded.tokenizer.encode(SAMPLE))
    if theirs != ours:
        raise ConvertError(f"{folder}: AutoTokenizer encodes a sample text as {theirs}, LightLM as {ours}")
