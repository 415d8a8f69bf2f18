"""Packing of requests so that each token is computed once: sequences with a common prefix become one tree of tokens.

Answers to one question share their context (HellaSwag, ARC, PIQA), two contexts share all but their end (WinoGrande,
BLiMP), or every document begins with the same examples (MMLU's five). Sorted by their tokens, such sequences are
neighbors, and one pass finds all prefixes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lightlm.evaluate.scoring.batches import BatchSize

# A prefix of at least this many tokens is computed once for several rows if that saves at least so many tokens. It
# costs a pass with only one row, and the rows behind it a further pass.
_PREFIX_TOKENS, _PREFIX_GAIN = 64, 256


@dataclass(frozen=True)
class Request:
    """A sequence: the model reads all `inputs`, and the last len(targets) outputs are scored."""

    index: int
    inputs: tuple[int, ...]
    targets: list[int]


@dataclass
class Tree:
    """A row: tokens in preorder (`lightlm.model.decoding.trees`), and the columns of each request's scored outputs."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)  # columns

    def __len__(self) -> int:
        return len(self.tokens)


def plan(
    requests: Sequence[Request], batch_size: BatchSize, attention_cost: float
) -> Iterator[tuple[tuple[int, ...], list[Tree]]]:
    """Yield (common prefix, trees that follow it) for all requests: first groups with a prefix, then that without.

    Trees are sorted, longest first, so that the first batch shows whether memory suffices and neighbors need little
    padding.

    Args:
        batch_size: the limit for a tree of several sequences.
        attention_cost: cost of attention for a pair of tokens in a row, relative to the cost of the other products for
            a token. Attention also computes masked pairs, so sequences with little in common are cheaper apart.
    """
    ordered = sorted(requests, key=lambda request: request.inputs)
    shared = [0, *(_shared(a.inputs, b.inputs) for a, b in pairwise(ordered))]
    plain = []
    for start, end in _runs(shared):
        run = ordered[start:end]
        # Scored tokens stay in the trees.
        contexts = (len(request.inputs) - len(request.targets) for request in run)
        length = min(*shared[start + 1 : end], *contexts) if len(run) > 1 else 0
        whole = list(_trees(run, shared[start:end], 0, batch_size, attention_cost))
        if length >= _PREFIX_TOKENS:
            behind = list(_trees(run, shared[start:end], length, batch_size, attention_cost))
            if sum(map(len, whole)) - sum(map(len, behind)) - length >= _PREFIX_GAIN:
                yield run[0].inputs[:length], sorted(behind, key=len, reverse=True)
                continue
        plain += whole
    yield (), sorted(plain, key=len, reverse=True)


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return the length of the common prefix of a and b."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _runs(shared: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of neighbors that share a long prefix, and of the sequences between them."""
    start = 0
    joins = [False, *(common >= _PREFIX_TOKENS for common in shared[1:])]
    for n in range(1, len(shared)):
        # If sequence n shares the prefix of n - 1, the run starts there; if not, the run ends there.
        border = n - 1 if joins[n] else n
        if joins[n] != joins[n - 1] and border > start:
            yield start, border
            start = border
    yield start, len(shared)


def _trees(
    run: list[Request], shared: list[int], prefix: int, batch_size: BatchSize, attention_cost: float
) -> Iterator[Tree]:
    """Join neighbors to trees as long as that is cheaper than a tree for each; leave out the first `prefix` tokens."""
    most = batch_size.sequences or len(run)
    tree = Tree()
    path: list[int] = []  # columns of the last request's tokens
    for request, common in zip(run, shared, strict=True):
        own = len(request.inputs) - prefix
        saved = common - prefix if tree.tokens else 0
        joined = len(tree) + own - saved
        added_attention = attention_cost * (joined**2 - len(tree) ** 2 - own**2)
        full = len(tree.requests) >= most or joined > max(batch_size.positions, own, len(tree))
        if tree.tokens and (saved <= added_attention or full):
            yield tree
            tree, path, saved = Tree(), [], 0
        del path[saved:]
        added = range(len(tree), len(tree) + own - saved)
        tree.tokens += request.inputs[prefix + saved :]
        tree.positions += range(prefix + saved, len(request.inputs))
        tree.ends += added
        path += added
        for node in path:
            tree.ends[node] = len(tree)
        tree.requests.append(request)
        first = len(request.inputs) - len(request.targets) - prefix
        tree.scored.append(path[first:])
    yield tree


def batches(trees: list[Tree], batch_size: BatchSize) -> Iterator[list[Tree]]:
    """Yield the trees, longest first, in batches; a tree above the limit becomes a batch of one."""
    batch: list[Tree] = []
    requests = 0
    for tree in trees:
        rows = len(batch) + 1 if batch_size.sequences is None else requests + len(tree.requests)
        if batch and not batch_size.fits(rows, len(batch[0])):
            yield batch
            batch, requests = [], 0
        batch.append(tree)
        requests += len(tree.requests)
    if batch:
        yield batch
