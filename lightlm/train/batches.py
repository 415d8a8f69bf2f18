"""How large each batch of a run is: a pure function of the tokens before it, from the recipe alone.

Neither the micro-batch nor the number of ranks is asked, so that a run means the same on every machine.
"""

from dataclasses import dataclass

from lightlm.recipe import Recipe, span_tokens


@dataclass(frozen=True)
class BatchPlan:
    """The sizes of a run's batches; all are multiples of the first.

    Attributes:
        stages: (first token, sequences): a batch that begins at or after this token, and before the next stage's,
            has so many sequences. The first stage begins at 0, the last within the run; sizes grow.
        seq_len: tokens of a sequence.
        tokens: the run ends with the batch that reaches this count.
    """

    stages: tuple[tuple[int, int], ...]
    seq_len: int
    tokens: int

    def sequences(self, tokens: int) -> int:
        """Sequences of the batch that begins after `tokens` tokens."""
        return next(sequences for first, sequences in reversed(self.stages) if first <= tokens)

    def remaining(self, tokens: int = 0) -> tuple[int, int]:
        """Steps that follow after `tokens` tokens, and the tokens of the whole run once they are done."""
        steps = 0
        ends = [first for first, _ in self.stages[1:]] + [self.tokens]
        for (_, sequences), end in zip(self.stages, ends, strict=True):
            size = sequences * self.seq_len
            count = max(0, -(-(end - tokens) // size))
            steps, tokens = steps + count, tokens + count * size
        return steps, tokens


def batch_plan(recipe: Recipe) -> BatchPlan:
    """The recipe's batches: one size, or a warm-up that doubles it.

    GPT-3 let its batch grow linearly over the first tokens (arXiv 2005.14165, section 2.3). Here a batch is the largest
    doubling of `schedule.batch_start` under that line, and the full batch at its end: few sizes, so that products keep
    their shapes and `torch.compile` its code.
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
