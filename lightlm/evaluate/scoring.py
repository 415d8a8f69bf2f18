"""Log-likelihoods of continuations, batched by length, with contexts that several continuations share read once.

Shapes: G groups, R requests, T positions, D hidden size, N scored positions, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightlm.errors import LightLMError
from lightlm.model.transformer import Transformer

# Positions a batch may hold: on a CPU enough for large matrix products with little padding; a GPU wants more.
_BUDGET = {"cpu": 4096, "mps": 16384, "cuda": 65536}
_HEAD_ROWS = 1024  # positions that go through the head at a time: 200 MB of fp32 logits at 50k tokens


@dataclass(frozen=True)
class Score:
    """The sum of the continuation's log-probabilities (nats), and whether greedy decoding would have written it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class BatchSize:
    """Limits of one batch: `sequences` if given, else so many positions, padding included."""

    positions: int
    sequences: int | None = None

    @classmethod
    def of(cls, batch_size: int | str, device: torch.device) -> "BatchSize":
        """From a command line's `auto` or number.

        Raises:
            ValueError: it is neither.
        """
        sequences = None if str(batch_size).startswith("auto") else int(batch_size)
        if sequences is not None and sequences < 1:
            raise ValueError(batch_size)
        return cls(_BUDGET.get(device.type, _BUDGET["cpu"]), sequences)

    def fits(self, sequences: int, length: int) -> bool:
        if self.sequences is not None:
            return sequences <= self.sequences
        return sequences == 1 or sequences * length <= self.positions


@dataclass
class Member:
    """One request: `own` tokens are read after the group's prefix; the last len(targets) outputs are scored."""

    index: int
    own: list[int]
    targets: list[int]


@dataclass
class Group:
    """Requests that share a prefix. A request that is alone carries all its input in the prefix."""

    prefix: list[int]
    members: list[Member] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prefix) + max(len(member.own) for member in self.members)


@torch.no_grad()
def score(
    model: Transformer,
    requests: list[tuple[list[int], list[int]]],
    batch_size: BatchSize,
    on_done: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """Score each (context ids, continuation ids); both must have at least one token.

    A request longer than the model's context loses tokens from the left, as in lm-eval's `hf` model: of
    context + continuation the last max_seq_len + 1 tokens stay, all but the last are read, and the outputs of
    the last len(continuation) are scored.

    Args:
        on_done: told after each batch how many requests it finished.

    Raises:
        LightLMError: a continuation alone is longer than the model's context.
    """
    scores: list[Score] = [Score(0.0, True)] * len(requests)
    for groups in _batches(_group(requests, model.config.max_seq_len, batch_size), batch_size):
        members = [member for group in groups for member in group.members]
        for member, result in zip(members, _score_batch(model, groups), strict=True):
            scores[member.index] = result
        on_done(len(members))
    return scores


def _group(requests: list[tuple[list[int], list[int]]], max_seq_len: int, batch_size: BatchSize) -> list[Group]:
    """Requests with one context brought together, longest first: the first batch shows whether memory suffices."""
    by_prefix: dict[tuple[int, ...], list[Member]] = {}
    for index, (context, continuation) in enumerate(requests):
        if len(continuation) > max_seq_len:
            raise LightLMError(
                f"an answer to be scored has {len(continuation):,} tokens, the model's context holds {max_seq_len:,}; "
                "this task does not fit this model"
            )
        inputs = (context + continuation)[-(max_seq_len + 1) : -1]
        cut = len(inputs) - len(continuation) + 1
        by_prefix.setdefault(tuple(inputs[:cut]), []).append(Member(index, inputs[cut:], continuation))
    groups = []
    for prefix, members in by_prefix.items():
        if len(members) == 1:
            [member] = members
            groups.append(Group([*prefix, *member.own], [Member(member.index, [], member.targets)]))
            continue
        length = Group(list(prefix), members).length
        at_once = next(n for n in range(len(members), 0, -1) if n == 1 or batch_size.fits(n, length))
        groups += [Group(list(prefix), members[n : n + at_once]) for n in range(0, len(members), at_once)]
    return sorted(groups, key=lambda group: group.length, reverse=True)


def _batches(groups: list[Group], batch_size: BatchSize) -> Iterator[list[Group]]:
    batch: list[Group] = []
    rows = 0
    for group in groups:
        if batch and not batch_size.fits(rows + len(group.members), batch[0].length):
            yield batch
            batch, rows = [], 0
        batch.append(group)
        rows += len(group.members)
    if batch:
        yield batch


def _score_batch(model: Transformer, groups: list[Group]) -> Iterator[Score]:
    """Scores of all members, group by group."""
    members = [(row, member) for row, group in enumerate(groups) for member in group.members]
    prefix_GTD, own_RTD = _hidden_states(model, groups, members)
    scored = []
    for line, (row, member) in enumerate(members):
        end = len(groups[row].prefix)
        scored.append(prefix_GTD[row, end - (len(member.targets) - len(member.own)) : end])
        if own_RTD is not None:
            scored.append(own_RTD[line, : len(member.own)])
    targets_N = torch.tensor([token for _, member in members for token in member.targets], device=model.device)
    log_probs_N, greedy_N = _target_log_probs(model, torch.cat(scored), targets_N)
    lengths = [len(member.targets) for _, member in members]
    # Summed on the CPU: Apple's GPUs know no float64.
    for log_probs, greedy in zip(log_probs_N.cpu().split(lengths), greedy_N.cpu().split(lengths), strict=True):
        yield Score(float(log_probs.double().sum()), bool(greedy.all()))


def _hidden_states(
    model: Transformer, groups: list[Group], members: list[tuple[int, Member]]
) -> tuple[Tensor, Tensor | None]:
    """Outputs over the prefixes (G, T, D), and over the members' own tokens (R, T, D) where there are any.

    The rows are padded on the right: what follows a token does not change its output.
    """
    own_length = max(len(member.own) for _, member in members)
    prefixes_GT = _pad([group.prefix for group in groups]).to(model.device)
    if not own_length:
        return model.hidden_states(prefixes_GT), None
    cache = model.new_cache(len(groups), prefixes_GT.shape[1] + own_length)
    counts = [len(group.prefix) for group in groups]
    prefix_GTD = model.hidden_states(prefixes_GT, cache, counts)
    cache.select([row for row, _ in members])
    own_RT = _pad([member.own for _, member in members]).to(model.device)
    return prefix_GTD, model.hidden_states(own_RT, cache, [len(member.own) for _, member in members])


def _pad(rows: list[list[int]]) -> Tensor:
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens)] = torch.tensor(tokens)
    return padded


def _target_log_probs(model: Transformer, x_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability in fp32, and whether it is the most likely token; the head sees N rows, no more."""
    log_probs, greedy = [], []
    for x, targets in zip(x_ND.split(_HEAD_ROWS), targets_N.split(_HEAD_ROWS), strict=True):
        logits_NV = model.head(x).float()
        target_logits = logits_NV.gather(-1, targets[:, None])[:, 0]
        log_probs.append(target_logits - logits_NV.logsumexp(-1))
        greedy.append(logits_NV.argmax(-1) == targets)
    return torch.cat(log_probs), torch.cat(greedy)
