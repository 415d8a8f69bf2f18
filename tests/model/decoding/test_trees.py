"""Rows that are trees: each token's output is that of its own sequence."""

import pytest
import torch

from lightlm.model.decoding.trees import Trees
from tests.shapes import SHAPES, build

# 1 2 (3 4 | 3 5 | 6), then a tree of one token; children follow their parents.
TOKENS = [1, 2, 3, 4, 5, 6, 7]
POSITIONS = [0, 1, 2, 3, 3, 2, 0]
ENDS = [6, 6, 5, 4, 5, 6, 7]
PATHS = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [7]]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [[], [8, 9, 10, 11, 12, 13, 14, 15]])
def test_a_token_sees_its_ancestors_and_nothing_else(shape: str, shared: list[int]) -> None:
    model = build(shape)
    prefix = None
    if shared:
        prefix = model.new_cache(1, len(shared))
        model.hidden_states(torch.tensor([shared]), prefix)
    positions = torch.tensor([POSITIONS]) + len(shared)
    trees = Trees(positions.expand(2, -1), torch.tensor([ENDS, ENDS]), prefix)
    rows = model.hidden_states(torch.tensor([TOKENS, TOKENS]), trees=trees)
    for column, path in enumerate(PATHS):
        alone = model.hidden_states(torch.tensor([[*shared, *path]]))[0, -1]
        for row in rows:
            torch.testing.assert_close(row[column], alone, atol=1e-4, rtol=1e-4)


def test_trees_and_a_cache_do_not_mix() -> None:
    model = build("llama")
    trees = Trees(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="shared prefix"):
        model.hidden_states(torch.tensor([[1]]), model.new_cache(1, 4), trees=trees)
