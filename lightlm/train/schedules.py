"""Learning rate and batch size as pure functions of the recipe and of the tokens that a run has seen.

Neither depends on the micro-batch or on the number of processes, so that a run is the same on every machine.
"""

import math
from dataclasses import dataclass

from lightlm.recipe import Recipe, ScheduleSection, span_tokens


def learning_rate_factor(schedule: ScheduleSection, tokens: int, total_tokens: int) -> float:
    """Return the share of the peak learning rate at `tokens` of `total_tokens`.

    A batch asks for its middle, so that neither the first nor the last has a rate of zero. The rate rises linearly from
    zero during the warm-up. Then, by `schedule.name`: `constant`; `wsd` is constant and decays at the end (arXiv
    2404.06395), linearly or as 1 - sqrt (arXiv 2405.18392); `cosine` and `linear` decay over `decay` tokens and stay at
    `min_lr_ratio` afterwards.
    """
    warmup = span_tokens(schedule.warmup, total_tokens)
    if tokens < warmup:
        return tokens / warmup
    if schedule.name == "constant":
        return 1.0
    length = span_tokens(schedule.decay_span, total_tokens) if schedule.decay_span else total_tokens - warmup
    if schedule.name == "wsd":
        left = min((total_tokens - tokens) / max(length, 1), 1.0)
        share = left if schedule.decay_shape == "linear" else 1 - math.sqrt(1 - left)
    else:
        progress = min((tokens - warmup) / max(length, 1), 1.0)
        share = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share


@dataclass(frozen=True)
class BatchPlan:
    """The sizes of a run's batches; all are multiples of the first.

    Attributes:
        stages: (first token, sequences): the size of the batches that begin at or after this token and before the next
            stage. The first stage begins at 0, the last within the run; sizes grow.
        seq_len: tokens per sequence.
        tokens: the run ends with the batch that reaches this count.
    """

    stages: tuple[tuple[int, int], ...]
    seq_len: int
    tokens: int

    def sequences(self, tokens: int) -> int:
        """Return the sequences of the batch that begins after `tokens` tokens."""
        return next(sequences for first, sequences in reversed(self.stages) if first <= tokens)

    def remaining(self, tokens: int = 0) -> tuple[int, int]:
        """Return the number of steps after `tokens` tokens, and the tokens of the whole run."""
        steps = 0
        ends = [first for first, _ in self.stages[1:]] + [self.tokens]
        for (_, sequences), end in zip(self.stages, ends, strict=True):
            size = sequences * self.seq_len
            count = max(0, -(-(end - tokens) // size))
            steps, tokens = steps + count, tokens + count * size
        return steps, tokens


def batch_plan(recipe: Recipe) -> BatchPlan:
    """Return the recipe's batches: one size, or a warm-up that doubles the size.

    GPT-3's batch grows linearly over the first tokens (arXiv 2005.14165, section 2.3). Here a batch is the largest
    doubling of `schedule.batch_start` below that line, and the full batch at its end. With so few sizes, matrix
    products keep their shapes and `torch.compile` keeps its code.
    """
    full = recipe.batch_sequences
    warmup = span_tokens(recipe.schedule.batch_warmup, recipe.train.tokens)
    stages = []
    if warmup and recipe.schedule.batch_start:
        start = recipe.schedule.batch_start // recipe.seq_len
        size = start
        while size < full:
            stages.append((-(-warmup * (size - start) // (full - start)), size))
            size *= 2
        stages.append((warmup, full))
    else:
        stages.append((0, full))
    return BatchPlan(tuple(stages), recipe.seq_len, recipe.train.tokens)
