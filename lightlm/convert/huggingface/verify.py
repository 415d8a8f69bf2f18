"""Compare a Hugging Face folder with one of our models, by running transformers' own code."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightlm.checkpoint import LoadedModel
from lightlm.convert.huggingface.config import read_json
from lightlm.convert.huggingface.layouts import LAYOUTS
from lightlm.convert.samples import sample_tokens
from lightlm.errors import ConvertError
from lightlm.model.moe import Router

# The largest accepted difference of float32 logits, relative to the largest: the two may only differ in the order of
# sums. Measured on one CPU: 0 for SmolLM2-135M.
TOLERANCE = 1e-4
# Two experts tie if a token's last chosen one scores (softmax: in logit) less than this above the next, so that the
# order of sums may decide. Measured on one CPU over 30 layers of 384 with 32 experts: scores differ by 1.3e-6 at most,
# 1 to 2 % of tokens tie.
TIE = 1e-5
SAMPLE = "Hello, I am a language model: naïve café, 3.14,\n\tdon't stop.  The end"
_NUMBERS = " ".join(map(str, range(100)))  # some programs split them into digits


@torch.no_grad()
def largest_difference(loaded: LoadedModel, folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest absolute difference of logits between our model and a Hugging Face folder's, and its limit.

    Both models' weights are rounded to `dtype` and then run in float32 on the same tokens, so the same tolerance holds
    for bfloat16. Where two experts tie, either may be chosen, and logits differ from that token onward. So a sequence
    is compared up to the first token that differs and had a tie; its first token always counts.
    """
    import transformers

    try:
        with _without_progress_bar():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConvertError(f"transformers {transformers.__version__} cannot load {folder}: {error}") from error
    ours = copy.deepcopy(loaded.model).cpu()
    tokens_BT = sample_tokens(loaded)
    layout = LAYOUTS[read_json(folder / "config.json")["model_type"]]
    # Only parameters: `.to` would also round their table of rotary frequencies, which is not in the file.
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(dtype).float()
    for name, parameter in ours.named_parameters():
        offset = layout.offset(name)
        parameter.data = (parameter.data - offset).to(dtype).float() + offset
    if hasattr(theirs, "set_experts_implementation"):  # since transformers 5; its default refuses some widths
        theirs.set_experts_implementation("eager")
    margins: list[Tensor] = []
    for router in (module for module in ours.modules() if isinstance(module, Router)):
        router.register_forward_hook(lambda router, _, routed: margins.append(_margins(router, *routed[2:])))
    ours_BTV = ours(tokens_BT)
    difference_BT = (ours_BTV - theirs.eval()(tokens_BT).logits).abs().amax(-1)
    limit = TOLERANCE * max(ours_BTV.abs().max().item(), 1.0)
    tied_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for margins_N in margins:
        tied_BT |= (margins_N < TIE).view_as(tokens_BT)
    rows = zip(difference_BT, tied_BT, strict=True)
    return max(_comparable(*row, limit).max().item() for row in rows), limit


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar over our output while it loads weights."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _margins(router: Router, scores_NE: Tensor, logits_NE: Tensor) -> Tensor:
    """Return how far each token's last chosen expert scores above the first that was not chosen (N,)."""
    choice_NE = logits_NE if router.selection_bias is None else scores_NE + router.selection_bias
    if router.chosen == choice_NE.shape[1]:
        return torch.full_like(choice_NE[:, 0], torch.inf)
    best_NK = choice_NE.topk(router.chosen + 1).values
    return best_NK[:, -2] - best_NK[:, -1]


def _comparable(difference_T: Tensor, tied_T: Tensor, limit: float) -> Tensor:
    """Return the differences of a sequence up to the one that a tie explains, at least the first token's."""
    differing = (difference_T > limit).nonzero().flatten().tolist()
    end = differing[0] if differing and tied_T[differing[0]] else len(difference_T)
    return difference_T[: max(end, 1)]


def check_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    """Raise ConvertError if `AutoTokenizer` gives other ids of a sample text than our tokenizer."""
    import transformers

    for text in (SAMPLE, _NUMBERS):
        ours = [*loaded.tokenizer.context_ids, *loaded.tokenizer.encode(text)]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        if (found := theirs(text, verbose=False)["input_ids"]) == ours:
            continue
        message = f"{folder}: AutoTokenizer encodes a sample text as {found}, LightLM as {ours}"
        plain = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        if plain(text, verbose=False)["input_ids"] == ours:
            message = (
                f"{folder}: the logits are right, but AutoTokenizer of transformers {transformers.__version__} reads "
                f"the tokenizer of every model of type {read_json(folder / 'config.json')['model_type']} as "
                f"{type(theirs).__name__}, which splits text otherwise than this one; load it by "
                "PreTrainedTokenizerFast.from_pretrained"
            )
        raise ConvertError(message)
