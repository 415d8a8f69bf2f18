"""The next token of each row, and the log-probabilities of the model.

Shapes: B rows, V vocabulary, C candidates of a row.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightlm.errors import LightLMError
from lightlm.generate.sampling.adjustments import adjust
from lightlm.generate.sampling.filters import candidates
from lightlm.generate.sampling.settings import Sampling


@dataclass
class Row:
    """What the next token of a row depends on beside its logits.

    Args:
        generator: a CPU generator of this row only; None suffices for a temperature of 0.
        prompt: ids of the prompt.
        new: ids of the answer; whoever decodes appends each new token.
        stop_ids: ids that end the answer, banned before `min_new_tokens`.
    """

    sampling: Sampling
    generator: torch.Generator | None = None
    prompt: Sequence[int] = ()
    new: list[int] = field(default_factory=list)
    stop_ids: Collection[int] = ()


def copy_of(row: Row) -> Row:
    """Return a row that draws the same tokens and leaves this one as it is."""
    generator = None
    if row.generator is not None:
        generator = torch.Generator()
        generator.set_state(row.generator.get_state())
    return replace(row, generator=generator, new=list(row.new))


@dataclass(frozen=True)
class LogProbs:
    """Natural logarithms of the model's probabilities at one position, before all settings of sampling."""

    chosen: float  # of the token that was drawn
    top: tuple[tuple[int, float], ...]  # the most likely ids, from high to low


def sample(logits_BV: Tensor, rows: Sequence[Row], vocab_size: int | None = None) -> list[int]:
    """Draw one token per row.

    A row draws one number from its own generator, unless its temperature is 0. So its token depends on its own logits
    only, whatever the other rows and their settings are.

    Args:
        logits_BV: on any device, in any precision. It stays unchanged.
        vocab_size: the tokenizer's size. Ids at or above it, which an embedding padded to a round number has, are never
            drawn. None allows all ids.

    Raises:
        LightLMError: a logit is NaN, as with damaged weights, or where float16 overflows.
    """
    if bool(logits_BV.isnan().any()):
        raise LightLMError("the model computes NaN: its weights are damaged, or its numbers exceed its precision")
    logits_BV = adjusted(logits_BV[:, :vocab_size], rows)
    tokens = [0] * len(rows)
    groups: dict[tuple, list[int]] = {}
    for line, row in enumerate(rows):
        groups.setdefault(row.sampling.filters, []).append(line)
    for lines in groups.values():
        group_BV = logits_BV if len(lines) == len(rows) else logits_BV[lines]
        sampling = rows[lines[0]].sampling
        if sampling.temperature == 0:
            drawn = group_BV.argmax(-1).tolist()
        else:
            drawn = draw(*candidates(group_BV, sampling), [rows[line].generator for line in lines])
        for line, token in zip(lines, drawn, strict=True):
            tokens[line] = token
    return tokens


def adjusted(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Return the logits after bias, penalties and bans: the same tensor if no row has any, else a copy on the CPU."""
    lines = [line for line, row in enumerate(rows) if row.sampling.adjusts]
    if not lines:
        return logits_BV
    logits_BV = logits_BV.to("cpu", torch.promote_types(logits_BV.dtype, torch.float32), copy=True)
    for line in lines:
        row = rows[line]
        adjust(logits_BV[line], row.sampling, row.prompt, row.new, row.stop_ids)
    return logits_BV


def draw(probs_BC: Tensor, ids_BC: Tensor, generators: Sequence[torch.Generator | None]) -> list[int]:
    """Draw one id per row in proportion to `probs_BC`, with one number from each CPU generator.

    The ids race: each has an exponential waiting time of rate p, and the first one is drawn. The randomness of an id is
    a hash of it and of the row's number. So two models that draw with the same number draw the same id with a
    probability of at least (1 - d) / (1 + d), d being the total variation distance of their distributions (arXiv
    2408.07978).
    """
    keys = [torch.randint(-(2**31), 2**31, (), generator=generator) for generator in generators]
    times_BC = _exponential(torch.stack(keys).to(torch.int32)[:, None], ids_BC)
    drawn: list[int] = ids_BC.gather(-1, (probs_BC / times_BC).argmax(-1, keepdim=True))[:, 0].tolist()
    return drawn


def _exponential(keys_B1: Tensor, ids_BC: Tensor) -> Tensor:
    """Return float32 numbers (B, C) of an exponential distribution of rate 1, each a hash of an int32 key and an id.

    The hash is MurmurHash3's finalizer (Appleby, 2008) of their sum. Shifts of int32 copy the sign, so each is masked.
    """
    bits_BC = ids_BC.to(torch.int32) + keys_B1
    bits_BC ^= (bits_BC >> 16) & 0xFFFF
    bits_BC *= 0x85EBCA6B - 2**32
    bits_BC ^= (bits_BC >> 13) & 0x7FFFF
    bits_BC *= 0xC2B2AE35 - 2**32
    bits_BC ^= (bits_BC >> 16) & 0xFFFF
    # 31 bits as a uniform number. Near 0 its logarithm as log1p is precise: short times decide the race.
    return (bits_BC & 0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_()


def log_probs(logits_BV: Tensor, tokens: Sequence[int], count: int, vocab_size: int | None = None) -> list[LogProbs]:
    """Return the log-probabilities of each row's token and of its `count` most likely ids below `vocab_size`.

    They are normalized over the whole vocabulary, as scores of `lightlm eval` are.
    """
    logits_BV = logits_BV.float()
    total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    chosen_B = logits_BV.gather(-1, torch.tensor(tokens, device=logits_BV.device)[:, None])[:, 0] - total_B1[:, 0]
    drawable_BV = logits_BV[:, :vocab_size]
    top_BC, ids_BC = drawable_BV.topk(min(count, drawable_BV.shape[-1]))
    found = zip(chosen_B.tolist(), ids_BC.tolist(), (top_BC - total_B1).tolist(), strict=True)
    return [LogProbs(chosen, tuple(zip(ids, values, strict=True))) for chosen, ids, values in found]
