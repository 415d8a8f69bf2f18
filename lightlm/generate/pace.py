"""When guesses pay: the tokens that a round of guesses makes, against what a round costs.

Costs are measured once for a model and a machine and then remembered. So the rounds in which a text is guessed depend
on the text and not on the clock: in bf16 and int8, logits of a wide pass differ by rounding from those of plain steps,
and the same command must give the same text.
"""

import itertools
import math
import time
from collections.abc import Sequence

import torch

from lightlm.generate.sampling import GREEDY
from lightlm.generate.sampling.draw import Row
from lightlm.generate.speculation import Follower, Guesser
from lightlm.generate.step.fast import forward_of
from lightlm.generate.step.measured import measured_once, speed_facts
from lightlm.model.transformer import Transformer

_TRIAL, _LOSS = 4, 3.0  # guesses are judged after so many rounds, or when they have lost so many plain steps
_PAUSE, _LONGEST = 32, 1024  # guesses pause for so many plain steps for each one lost, and at most
_DECAY = 0.9  # of a round in the average, per later round
_PROMPT = 32  # tokens before the measured passes
_ROUNDS, _SECONDS = 7, 0.3  # each pass is measured so often at least, and all of them for so long


class Pace:
    """Whether to guess next.

    Args:
        costs: what a round of 1, 2, ... guesses takes, in plain steps; of more guesses, the last one counts.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        self._costs = costs
        self._made = self._spent = 0.0  # tokens of recent rounds, and plain steps that would have taken as long
        self._trial = 0  # rounds since guesses were last taken up
        self._wait, self._patience = 0, 1  # plain steps until they are; pauses double while guesses keep losing

    @property
    def guesses(self) -> bool:
        """Whether to guess next."""
        return self._wait == 0

    def note_plain(self) -> None:
        """Note a plain step, which makes one token."""
        self._wait = max(0, self._wait - 1)

    def note_round(self, guesses: int, tokens: int) -> None:
        """Note a round of guesses and the tokens that it made. Guesses pause if they are slower than plain steps."""
        self._trial += 1
        self._made = _DECAY * self._made + tokens
        self._spent = _DECAY * self._spent + self._costs[min(guesses, len(self._costs)) - 1]
        lost = self._spent - self._made
        if self._trial < _TRIAL and lost < _LOSS:
            return
        if lost < 0:
            self._patience = 1
            return
        self._wait = 1 + math.ceil(min(lost * _PAUSE * self._patience, _LONGEST))
        self._made = self._spent = 0.0
        self._trial, self._patience = 0, 2 * self._patience


def round_costs(model: Transformer, guesser: Guesser, count: int) -> list[float]:
    """Return what a round of 1, 2, ..., `count` guesses takes on this machine, in plain steps.

    The first call for a shape, a guesser and a number of threads measures for 0.3 s or longer, and remembers.
    A context may be too small for so many guesses; then there are fewer costs.
    """
    facts = ["round", *speed_facts(model), guesser.facts, count, torch.get_num_threads()]

    def accepts(value: object) -> bool:
        costs = value if isinstance(value, list) else []
        return bool(costs) and all(isinstance(cost, float) and cost > 0 for cost in costs)

    return measured_once(facts, lambda: _measure(model, guesser, count), accepts)


@torch.no_grad()
def _measure(model: Transformer, guesser: Guesser, count: int) -> list[float]:
    """Measure rounds and plain steps in turn; the fastest of each counts, so that a busy core slows neither."""
    context = model.config.max_seq_len
    count = max(1, min(count, context - 2))
    if context < 3:
        return [math.inf]
    read = min(_PROMPT, context - 1 - count)
    row = Row(GREEDY, prompt=[place % model.config.vocab_size for place in range(read)], new=[0])
    forward, cache = forward_of(model), model.new_cache(1, read + 1 + count)
    states_1TD = forward.hidden_states(torch.tensor([row.prompt], device=model.device), cache)
    passes = [torch.zeros(1, 1 + guesses, dtype=torch.long, device=model.device) for guesses in range(count + 1)]
    best = [math.inf] * len(passes)
    begun = time.perf_counter()
    for number in itertools.count():
        if number >= _ROUNDS and time.perf_counter() - begun >= _SECONDS:
            break
        for guesses, tokens_1T in enumerate(passes):
            if guesses and isinstance(guesser, Follower):
                guesser.follow(row, read - 1, states_1TD[0, -1:])
            started = time.perf_counter()
            if guesses:
                guesser.guess(row, guesses)
            forward(tokens_1T, cache)[0, -1].argmax().item()
            best[guesses] = min(best[guesses], time.perf_counter() - started)
            cache.cut(0, read)
    return [seconds / best[0] for seconds in best[1:]]
