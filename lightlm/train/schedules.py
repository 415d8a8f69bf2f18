"""Learning-rate schedules: pure functions of how many tokens the run has seen."""

import math

from lightlm.recipe import ScheduleSection, span_tokens


def learning_rate_factor(schedule: ScheduleSection, tokens: int, total_tokens: int) -> float:
    """The share of the peak learning rate at `tokens` of `total_tokens` (a batch asks for its middle, so that
    neither the first nor the last has a rate of zero).

    Linear warm-up from zero; then, by `schedule.name`, constant; constant with a decay at the end ("wsd", arXiv
    2404.06395), linear or as 1 - sqrt (arXiv 2405.18392); or half a cosine or a straight line over `decay` tokens,
    which stays at `min_lr_ratio` afterwards.
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
