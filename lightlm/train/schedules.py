"""Learning-rate schedules: pure functions of how many tokens the run has seen."""

import math

from lightlm.recipe import ScheduleSection, span_tokens

# Share of a WSD run that the decay takes where the recipe names none (SmolLM2-135M decays over its last 20%).
_WSD_DECAY = "20%"


def learning_rate_factor(schedule: ScheduleSection, tokens: int, total_tokens: int) -> float:
    """The share of the peak learning rate at `tokens` of `total_tokens` (a batch asks for its middle, so that
    neither the first nor the last has a rate of zero).

    Linear warm-up from zero; then, by `schedule.name`, constant; constant with a linear decay at the end
    ("wsd", arXiv 2404.06395); or half a cosine over `decay` tokens that stays at `final_lr` afterwards.
    """
    warmup = span_tokens(schedule.warmup, total_tokens)
    if tokens < warmup:
        return tokens / warmup
    floor = schedule.final_lr
    if schedule.name == "cosine":
        length = span_tokens(schedule.decay, total_tokens) if schedule.decay else total_tokens - warmup
        progress = min((tokens - warmup) / max(length, 1), 1.0)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    if schedule.name == "wsd":
        length = span_tokens(schedule.decay or _WSD_DECAY, total_tokens)
        return floor + (1 - floor) * min((total_tokens - tokens) / max(length, 1), 1.0)
    return 1.0
