"""The statistics of comparisons, against formulas written out here, published examples and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lightlm.evaluate.compare import paired

MEAN, BITS, PERPLEXITY = paired.FORMS


@pytest.mark.parametrize(
    ("gained", "lost"), [(9, 1), (1, 9), (6, 59), (25, 25), (26, 25), (0, 1), (0, 6), (3000, 3100)]
)
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    assert paired.mcnemar(gained, lost) == pytest.approx(min(2 * tail / 2**count, 1.0), rel=1e-9)


def test_mcnemar_on_the_textbooks_example():
    # Agresti's approval ratings of a prime minister (Categorical Data Analysis): of 1,600 voters 150 changed to no and
    # 86 to yes, a chi-squared of (150 - 86)^2 / (150 + 86) = 17.36.
    assert paired.mcnemar(86, 150) == pytest.approx(stats.chi2.sf(17.36, 1), rel=0.25)
    assert paired.mcnemar(0, 0) == 1.0


def test_the_interval_of_accuracies_is_the_one_that_theory_gives():
    gained, lost, count = 300, 200, 4000
    first = np.repeat([0.0, 1.0, 1.0], [gained, lost, count - gained - lost])
    second = np.repeat([1.0, 0.0, 1.0], [gained, lost, count - gained - lost])
    found = paired.difference(first, second, np.ones(count), MEAN)
    error = 1.96 * math.sqrt((gained + lost) / count - (100 / count) ** 2) / math.sqrt(count)
    assert found.value == pytest.approx(100 / count)
    assert (found.low, found.high) == pytest.approx((100 / count - error, 100 / count + error), abs=0.03 * 2 * error)
    assert found.p_value == pytest.approx(stats.binomtest(300, 500).pvalue)


def test_the_interval_of_a_ratio_of_sums_is_that_of_resampled_documents():
    rng = np.random.default_rng(3)
    sizes = rng.integers(50, 3000, 150).astype(float)
    first = -sizes * rng.normal(0.8, 0.2, 150)
    second = first + sizes * rng.normal(0.02, 0.08, 150)

    def bits(chosen):
        return (first[chosen].sum() - second[chosen].sum()) / sizes[chosen].sum() / math.log(2)

    resampled = [bits(rng.integers(0, 150, 150)) for _ in range(10_000)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    ours = paired.difference(first, second, sizes, BITS)
    assert ours.value == pytest.approx(bits(np.arange(150)))
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_the_randomization_test_counts_the_arrangements_of_signs():
    differences = np.random.default_rng(5).normal(0.4, 1, 14)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=14)]
    share = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
    assert 0.02 < share < 0.5
    assert paired.sign_flip(differences) == pytest.approx(share, abs=0.012)
    # For zeros and ones it is McNemar's test.
    assert paired.sign_flip(np.repeat([1.0, -1.0], [14, 5])) == pytest.approx(paired.mcnemar(14, 5), abs=0.01)


def test_a_handful_of_documents_is_never_significant():
    assert paired.sign_flip(np.array([1.0, 2.0, 3.0, 1.5])) > 0.1  # 2 of 16 arrangements are as extreme
    assert paired.sign_flip(np.zeros(3)) == 1.0
    one = paired.difference(np.array([-30.0]), np.array([-20.0]), np.array([10.0]), BITS)
    assert (one.low, one.high, one.p_value) == (one.value, one.value, 1.0)


def test_no_count_of_resamples_shows_that_a_difference_is_impossible():
    assert paired.sign_flip(np.ones(60), resamples=99) == 0.01


def test_one_in_twenty_equal_models_differs():
    rng = np.random.default_rng(11)
    skill = rng.random((600, 120))
    right = [(rng.random(skill.shape) < skill).astype(float) for _ in range(2)]
    found = [
        paired.mcnemar(int((a > b).sum()), int((a < b).sum())) < paired.SIGNIFICANCE
        for a, b in zip(*right, strict=True)
    ]
    assert 0.015 <= np.mean(found) <= 0.06  # the exact test is a little too careful
    sizes = rng.integers(50, 3000, skill.shape)
    noise = sizes * rng.normal(0, 0.05, skill.shape)
    share = np.mean([paired.sign_flip(row, seed=i, resamples=499) < paired.SIGNIFICANCE for i, row in enumerate(noise)])
    assert 0.03 <= share <= 0.07


def test_a_real_difference_is_found():
    rng = np.random.default_rng(12)
    sizes = rng.integers(50, 3000, 200).astype(float)
    first = -sizes * rng.normal(0.8, 0.2, 200)
    found = paired.difference(first, first + sizes * rng.normal(0.01, 0.03, 200), sizes, BITS)
    assert found.p_value < 0.01
    assert found.low < found.value < found.high < 0


def test_results_repeat():
    rng = np.random.default_rng(13)
    a, b = rng.random((2, 50))
    assert paired.difference(a, b, np.ones(50), MEAN) == paired.difference(a, b, np.ones(50), MEAN)


def test_holm_by_hand():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04, which may not be below the one before.
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.012]) == [0.012]
    assert paired.holm([]) == []


def test_the_form_of_a_figure_is_found_in_its_documents():
    x, bytes_ = np.array([-30.0, -10.0]), np.array([20.0, 12.0])
    assert paired.form_of(np.array([1.0, 0, 0, 1]), np.ones(4), 0.5) is MEAN
    assert paired.form_of(x, bytes_, 40 / 32 / math.log(2)) is BITS
    assert paired.form_of(x, bytes_, math.exp(40 / 32)) is PERPLEXITY
    assert paired.form_of(x, bytes_, 0.7) is None
