"""Learning rate, weight decay, momentum, batch size and sources as pure functions of the recipe and of the tokens seen.

None depends on the micro-batch or on the number of processes, so that a run is the same on every machine.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lightlm.data.mixture import SourceOrder, Stage, shares_of
from lightlm.optim.section import StepSettings
from lightlm.quantities import format_quantity
from lightlm.recipe import Recipe, ScheduleSection, span_tokens

_NEARLY = 0.01  # of the peak: the difference between two rates that matters
_MANY_EPOCHS = 4  # arXiv 2305.16264; docs/ladder.md, epochs-short


def step_settings(recipe: Recipe, tokens: int, batch_tokens: int, total_tokens: int) -> StepSettings:
    """Return what the schedules say about the batch of `batch_tokens` tokens that begins after `tokens` tokens.

    A batch asks for its middle, so that neither the first nor the last has a learning rate of zero.
    """
    schedule, middle = recipe.schedule, tokens + batch_tokens // 2
    return StepSettings(
        lr=learning_rate_factor(schedule, middle, total_tokens),
        weight_decay=weight_decay_factor(schedule, middle, total_tokens),
        momentum=momentum(recipe, middle, total_tokens),
        batch_tokens=batch_tokens,
    )


def mtp_weight(recipe: Recipe, tokens: int, batch_tokens: int, total_tokens: int) -> float:
    """Return the weight of multi-token prediction in the batch of `batch_tokens` tokens that begins after `tokens`.

    It is DeepSeek-V3's (arXiv 2412.19437, section 4.2): 0.3 at first and 0.1 for the last third, by a batch's middle.
    """
    mtp, middle = recipe.train.mtp, tokens + batch_tokens // 2
    return mtp.weight if middle < span_tokens(mtp.anneal, total_tokens) else mtp.final_weight


def scheduled_metrics(recipe: Recipe, settings: StepSettings) -> dict[str, float]:
    """Return the metrics of what the recipe schedules beside the learning rate."""
    metrics = {}
    if recipe.schedule.weight_decay != "constant":
        metrics["weight_decay"] = recipe.optimizer.weight_decay * settings.weight_decay
    if settings.momentum is not None:
        metrics["momentum"] = settings.momentum
    return metrics


def learning_rate_factor(schedule: ScheduleSection, tokens: int, total_tokens: int) -> float:
    """Return the share of the peak learning rate at `tokens` of `total_tokens`.

    The rate rises linearly from zero during the warm-up. Then, by `schedule.name`: `constant`; `wsd` is constant and
    decays at the end (arXiv 2404.06395), linearly or as 1 - sqrt (arXiv 2405.18392); `cosine` and `linear` decay over
    `decay` tokens and stay at `min_lr_ratio` afterwards. A re-warmup multiplies this by a linear rise from zero.
    """
    factor, began = _planned_factor(schedule, tokens, total_tokens), schedule.rewarmup_from
    span = span_tokens(schedule.rewarmup, total_tokens)
    return factor * (tokens - began) / span if began is not None and began <= tokens < began + span else factor


def _planned_factor(schedule: ScheduleSection, tokens: int, total_tokens: int) -> float:
    warmup = span_tokens(schedule.warmup, total_tokens)
    if tokens < warmup:
        return tokens / warmup
    if schedule.name == "constant":
        return 1.0
    begin, end = _decay_phase(schedule, total_tokens)
    if schedule.name == "wsd":
        left = min((end - tokens) / max(end - begin, 1), 1.0)
        share = left if schedule.decay_shape == "linear" else 1 - math.sqrt(1 - left)
    else:
        progress = min((tokens - begin) / max(end - begin, 1), 1.0)
        share = (1 + math.cos(math.pi * progress)) / 2 if schedule.name == "cosine" else 1 - progress
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * share


def _decay_phase(schedule: ScheduleSection, total_tokens: int) -> tuple[int, int]:
    """Return the tokens at which the learning rate's decay begins and ends; with `constant` both are the run's end."""
    if schedule.name == "constant":
        return total_tokens, total_tokens
    warmup = span_tokens(schedule.warmup, total_tokens)
    length = span_tokens(schedule.decay_span, total_tokens) if schedule.decay_span else total_tokens - warmup
    return (total_tokens - length, total_tokens) if schedule.name == "wsd" else (warmup, warmup + length)


def weight_decay_factor(schedule: ScheduleSection, tokens: int, total_tokens: int) -> float:
    """Return the share of `optimizer.weight_decay` at `tokens` of `total_tokens`."""
    if schedule.weight_decay == "constant":
        return 1.0
    if schedule.weight_decay == "linear":
        return 1 - tokens / total_tokens
    if schedule.weight_decay == "cosine":
        return (1 + math.cos(math.pi * tokens / total_tokens)) / 2
    points = schedule.decay_points(total_tokens)
    if tokens < points[0][0]:
        return points[0][1]
    for (start, first), (end, last) in itertools.pairwise(points):
        if start <= tokens < end:
            return first + (last - first) * (tokens - start) / (end - start)
    return points[-1][1]


def momentum(recipe: Recipe, tokens: int, total_tokens: int) -> float | None:
    """Return the matrices' momentum at `tokens` of `total_tokens`, or None if it does not change within the run."""
    begin, end = _decay_phase(recipe.schedule, total_tokens)
    decayed = min(max((tokens - begin) / max(end - begin, 1), 0.0), 1.0)
    return recipe.optimizer.momentum_at(tokens, total_tokens, decayed)


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


def source_order(recipe: Recipe) -> SourceOrder:
    """Return the order of the recipe's sources. Like a decay, a stage has its share of the run in whole batches."""
    total, names = batch_plan(recipe).remaining()[1], recipe.data.sources
    return SourceOrder(
        [
            Stage(
                None if until is None else -(-span_tokens(until, total) // recipe.seq_len),
                shares_of([weights.get(name, 0.0) for name in names]),
            )
            for until, weights in recipe.data.parts
        ]
    )


def corner_points(recipe: Recipe) -> list[dict[str, float]]:
    """Return where the learning rate changes its course: `step`, `tokens` and `lr`, from the first step to the last.

    A re-warmup begins with two points at the same tokens: before and after the fall to zero.
    """
    schedule, total = recipe.schedule, batch_plan(recipe).remaining()[1]
    corners = {span_tokens(schedule.warmup, total), *_decay_phase(schedule, total)}
    began, again = schedule.rewarmup_from, span_tokens(schedule.rewarmup, total)
    if began is not None and again:
        corners |= {began, began + again}

    def rates(tokens: int) -> list[float]:
        factors = [learning_rate_factor(schedule, tokens, total)]
        if tokens == began and again:
            factors.insert(0, _planned_factor(schedule, tokens, total))
        return [recipe.optimizer.lr * factor for factor in factors]

    return _points(recipe, corners, "lr", rates)


def weight_decay_points(recipe: Recipe) -> list[dict[str, float]]:
    """Return where the weight decay changes its course: `step`, `tokens`, `weight_decay`; none if it is constant."""
    schedule, total = recipe.schedule, batch_plan(recipe).remaining()[1]
    if schedule.weight_decay == "constant":
        return []
    points = schedule.decay_points(total)

    def decays(tokens: int) -> list[float]:
        # Two points at the same tokens are a jump; at more of them, those between have no effect.
        here = [share for at, share in points if at == tokens]
        shares = [here[0], here[-1]] if len(here) > 1 else [weight_decay_factor(schedule, tokens, total)]
        return [recipe.optimizer.weight_decay * share for share in shares]

    return _points(recipe, {at for at, _ in points}, "weight_decay", decays)


def momentum_points(recipe: Recipe) -> list[dict[str, float]]:
    """Return where the momentum changes its course: `step`, `tokens` and `momentum`; none if it does not."""
    total = batch_plan(recipe).remaining()[1]
    if momentum(recipe, 0, total) is None:
        return []
    corners = {*recipe.optimizer.momentum_corners(total), *_decay_phase(recipe.schedule, total)}
    return _points(recipe, corners, "momentum", lambda tokens: [momentum(recipe, tokens, total) or 0.0])


def _points(
    recipe: Recipe, corners: set[int], key: str, values: Callable[[int], list[float]]
) -> list[dict[str, float]]:
    """Return the values at the corners within the run and at its ends; several values at one corner are jumps."""
    plan = batch_plan(recipe)
    steps, total = plan.remaining()
    return [
        {"step": steps - plan.remaining(tokens)[0], "tokens": tokens, key: value}
        for tokens in sorted({0, total} | {corner for corner in corners if 0 < corner < total})
        for value in values(tokens)
    ]


def describe_schedule(recipe: Recipe) -> str:
    """Return the corner points in words, such as `0 -> 0.003 at step 8 (30K tokens), constant to step 367 (...)`."""
    shape = {"cosine": "cosine", "wsd": recipe.schedule.decay_shape}.get(recipe.schedule.name, "linear")
    return _in_words(corner_points(recipe), "lr") + ("" if shape == "linear" else f" ({shape} decay)")


def describe_other_schedules(recipe: Recipe) -> dict[str, str]:
    """Return what else changes within the run, `weight decay` and `momentum`, in words as `describe_schedule` does."""
    decays, momenta = weight_decay_points(recipe), momentum_points(recipe)
    shape = " (cosine)" if recipe.schedule.weight_decay == "cosine" else ""
    texts = {"weight decay": decays and _in_words(decays, "weight_decay") + shape}
    texts["momentum"] = momenta and _in_words(momenta, "momentum")
    return {name: text for name, text in texts.items() if text}


def _in_words(points: Sequence[dict[str, float]], key: str) -> str:
    first, *others = points
    parts, before = [f"{first[key]:.3g}"], first
    for point in others:
        where = f"step {point['step']:,} ({format_quantity(point['tokens'])} tokens)"
        if point["tokens"] == before["tokens"]:
            parts.append(f", from {point[key]:.3g} again" if key == "lr" else f", then {point[key]:.3g} at once")
        elif point[key] == before[key]:
            parts.append(f", constant to {where}")
        else:
            parts.append(f"{' ' if before is first else ', '}-> {point[key]:.3g} at {where}")
        before = point
    return "".join(parts)


def begin_rewarmup(recipe: Recipe, tokens: int) -> Recipe:
    """Return the recipe of a run that resumes at `tokens`, with the beginning of its re-warmup filled in."""
    schedule = recipe.schedule
    if not schedule.warms_up_again or schedule.rewarmup_from is not None:
        return recipe
    return recipe.model_copy(update={"schedule": schedule.model_copy(update={"rewarmup_from": tokens})})


def note_on_resume(before: Recipe, after: Recipe, tokens: int) -> str | None:
    """Return what a resumed run's user should know about the learning rate, or None if it continues as it was.

    Args:
        before: the run's recipe so far.
        after: its recipe from now on.
        tokens: of the run so far.
    """
    if not batch_plan(after).remaining(tokens)[0]:
        return None
    if after.schedule.rewarmup_from == tokens != before.schedule.rewarmup_from:
        return f"the learning rate rises again from 0 over {after.schedule.rewarmup} of the run (schedule.rewarmup)"
    middle = tokens + batch_plan(after).sequences(tokens) * after.seq_len // 2
    old_total, new_total = (batch_plan(recipe).remaining()[1] for recipe in (before, after))
    peak = after.optimizer.lr
    old = before.optimizer.lr * learning_rate_factor(before.schedule, min(middle, old_total), old_total)
    new = peak * learning_rate_factor(after.schedule, middle, new_total)
    if abs(new - old) <= _NEARLY * peak:
        return None
    reached = ", its peak," if new >= (1 - _NEARLY) * peak else f" (peak: {peak:.3g})"
    text = f"the learning rate goes from {old:.3g} to {new:.3g}{reached} at once"
    settings = [
        ("optimizer.lr", f"{before.optimizer.lr:.3g}", f"{peak:.3g}"),
        ("train.tokens", f"{before.train.tokens:,}", f"{after.train.tokens:,}"),
    ]
    causes = [f"{key} was {was}, and is {now} now" for key, was, now in settings if was != now]
    text += f": {', '.join(causes)}" if causes else ""
    return text + (". To let it rise from 0 instead, add schedule.rewarmup=2%" if new > old else "")


def note_on_idle_end(recipe: Recipe) -> str | None:
    """Return a warning if the last part of the run has a learning rate of 0, which only an earlier run may have."""
    end = recipe.schedule.idle_end(recipe.train.tokens)
    if end is None:
        return None
    return (
        f"the learning rate is 0 from {format_quantity(end)} of {format_quantity(recipe.train.tokens)} tokens on: "
        f"schedule.decay is {recipe.schedule.decay} with {recipe.schedule.name}; schedule.decay=null fills the run"
    )


def notes_on_short_spans(recipe: Recipe) -> Iterator[str]:
    """Yield a warning for tokens of less than a batch, which may be meant as percent or steps."""
    schedule, batch = recipe.schedule, recipe.train.batch_tokens
    spans = {"schedule.warmup": schedule.warmup, "schedule.decay": schedule.decay, "train.ema": recipe.train.ema}
    spans["optimizer.momentum_warmup"] = getattr(recipe.optimizer, "momentum_warmup", None)
    if not isinstance(schedule.weight_decay, str):
        spans["schedule.weight_decay: point"] = schedule.weight_decay[-1][0]
    for key, span in spans.items():
        if span and not span.endswith("%") and 0 < span_tokens(span, 1) < batch:
            means = f"{key} {span} means {span_tokens(span, 1):,} tokens, less than one batch of {batch:,}"
            yield f"{means}; write a share of the run as 2%"
    intervals = {"eval.every": recipe.eval.every, "eval.tasks_every": recipe.eval.tasks_every}
    intervals |= {"checkpoint.every": recipe.checkpoint.every, "checkpoint.keep_every": recipe.checkpoint.keep_every}
    for key, every in intervals.items():
        if 0 < every < batch:
            means = f"{key} is {every:,} tokens, less than one batch of {batch:,}, so every step counts"
            yield f"{means}; write tokens, such as 500K"
    half_life = getattr(recipe.optimizer, "beta2_half_life", None)
    if half_life and half_life < batch:
        yield (
            f"optimizer.beta2_half_life is {half_life:,} tokens, less than one batch of {batch:,}: the second moment "
            "follows single gradients; write tokens of many batches, such as 10M"
        )


def note_on_repeats(tokens: int, data_tokens: int, source: str | None = None) -> str | None:
    """Return a warning if a run reads its data, or a source, more than four times in `tokens` tokens, or has none."""
    if not data_tokens and tokens:
        return f"{'the data' if source is None else source} has no train split: it is for scoring models only"
    if tokens <= _MANY_EPOCHS * data_tokens:
        return None
    times = tokens / data_tokens
    what = f"its {format_quantity(data_tokens)} tokens of data"
    if source is not None:
        what = f"the {format_quantity(data_tokens)} tokens of {source}"
    return (
        f"the run reads {what} {times:,.{0 if times >= 10 else 1}f} times. "
        "Beyond about 4 times, repeated text teaches less and less (arXiv 2305.16264), and a small model memorizes it: "
        "94K tokens read 8 times ended 3.1 nats above 750K read once (docs/ladder.md, epochs-short). Prepare more "
        "data, or lower train.tokens; checkpoint.keep_best=true keeps the checkpoint with the lowest validation loss"
    )
