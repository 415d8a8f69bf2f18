import math

from hypothesis import given
from hypothesis import strategies as st

from lightlm.train.observe.improvement import Best

LOSSES = st.lists(st.one_of(st.none(), st.just(math.nan), st.just(math.inf), st.floats(0, 20)), max_size=30)


@given(LOSSES)
def test_the_best_is_the_first_minimum_of_the_finite_losses(losses):
    best = Best()
    for step, loss in enumerate(losses, 1):
        best = best.after(step, loss)
    finite = [(loss, step) for step, loss in enumerate(losses, 1) if loss is not None and math.isfinite(loss)]
    lowest, first = min(finite, default=(None, 0))
    assert best == Best(lowest, first, len(losses) - first)
