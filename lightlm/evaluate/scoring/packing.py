"""Requests laid out so that each token is computed once: sequences that begin alike become one tree of tokens.

Answers to one question share their context (HellaSwag, ARC, PIQA), or two contexts share all but their end (WinoGrande,
BLiMP), or every document begins with the same examples (MMLU's five). In the order of their tokens such sequences
are neighbours, and one walk over them finds all of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# A beginning of so many tokens is computed once for several rows if that saves so many: it is a pass of its own, with
# but one row, and so is what stands behind it.
_TRUNK_TOKENS, _TRUNK_GAIN = 64, 256


@dataclass(frozen=True)
class Request:
    """One sequence: all of `inputs` is read, and the outputs of the last len(targets) are scored."""

    index: int
    inputs: tuple[int, ...]
    targets: list[int]


@dataclass
class Tree:
    """One row: tokens in preorder (see `lightlm.model.trees`), and where each request's scored outputs are."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)  # columns

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Stand:
    """Trees behind a trunk, longest first; an empty trunk is none."""

    trunk: tuple[int, ...]
    trees: list[Tree]


@dataclass(frozen=True)
class Limits:
    """What a tree may hold.

    Args:
        tokens: of a tree of several sequences.
        requests: of a tree.
        square: the cost of attention for a pair of tokens of a row, in parts of the cost of the products for one token.
            Attention computes what it hides, so distant relatives are cheaper apart.
    """

    tokens: int
    requests: int
    square: float


def plan(requests: Sequence[Request], limits: Limits) -> list[Stand]:
    """All requests in trees: first those with a trunk, then those without."""
    ordered = sorted(requests, key=lambda request: request.inputs)
    shared = [0, *(_shared(a.inputs, b.inputs) for a, b in pairwise(ordered))]
    stands, plain = [], Stand((), [])
    for start, end in _runs(shared):
        run = ordered[start:end]
        # What is scored stays in the trees.
        contexts = (len(request.inputs) - len(request.targets) for request in run)
        length = min(*shared[start + 1 : end], *contexts) if len(run) > 1 else 0
        whole = list(_trees(run, shared[start:end], 0, limits))
        if length >= _TRUNK_TOKENS:
            behind = list(_trees(run, shared[start:end], length, limits))
            if sum(map(len, whole)) - sum(map(len, behind)) - length >= _TRUNK_GAIN:
                stands.append(Stand(run[0].inputs[:length], _longest_first(behind)))
                continue
        plain.trees += whole
    plain.trees = _longest_first(plain.trees)
    return [*stands, plain] if plain.trees else stands


def _longest_first(trees: list[Tree]) -> list[Tree]:
    """The first batch shows whether memory suffices, and neighbours need little padding."""
    return sorted(trees, key=len, reverse=True)


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens a and b have in common before they differ."""
    if a == b:
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _runs(shared: list[int]) -> Iterator[tuple[int, int]]:
    """Stretches of neighbours that share enough for a trunk, and what lies between them."""
    start = 0
    in_run = False
    for n in range(1, len(shared)):
        joins = shared[n] >= _TRUNK_TOKENS
        if joins == in_run:
            continue
        # The sequence before this one opens a run; the run's last one belongs to it.
        border = n - 1 if joins else n
        if border > start:
            yield start, border
            start = border
        in_run = joins
    yield start, len(shared)


def _trees(run: list[Request], shared: list[int], trunk: int, limits: Limits) -> Iterator[Tree]:
    """Neighbours joined to trees as long as that is cheaper than a tree for each."""
    tree = Tree()
    path: list[int] = []  # columns of the last request's tokens
    for request, common in zip(run, shared, strict=True):
        own = len(request.inputs) - trunk
        saved = common - trunk if tree.tokens else 0
        joined = len(tree) + own - saved
        dearer = limits.square * (joined**2 - len(tree) ** 2 - own**2)
        full = len(tree.requests) >= limits.requests or joined > max(limits.tokens, own, len(tree))
        if tree.tokens and (saved <= dearer or full):
            _close(tree, path, 0)
            yield tree
            tree, path, saved = Tree(), [], 0
        _close(tree, path, saved)
        added = range(len(tree), len(tree) + own - saved)
        tree.tokens += request.inputs[trunk + saved :]
        tree.positions += range(trunk + saved, len(request.inputs))
        tree.ends += added
        path += added
        tree.requests.append(request)
        first = len(request.inputs) - len(request.targets) - trunk
        tree.scored.append(path[first:])
    _close(tree, path, 0)
    yield tree


def _close(tree: Tree, path: list[int], keep: int) -> None:
    """Leave the path's nodes from `keep` on: nothing more will follow them."""
    for node in path[keep:]:
        tree.ends[node] = len(tree)
    del path[keep:]
