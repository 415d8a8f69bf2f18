"""Polar Express: polynomials that orthogonalize in as few products as possible (arXiv 2505.16932).

Each step applies an odd quintic p(x) = a x + b x^3 + c x^5 to the singular values. Its coefficients are the best for
the interval in which the values then lie: they minimize the largest |p(x) - 1|. Newton-Schulz repeats one polynomial.

Everything here is float64 arithmetic on a few numbers, done once per run.
"""

import math

import numpy as np

Quintic = tuple[float, float, float]

# The paper's settings. Singular values are shares of the matrix's norm.
_LEAST = 1e-3  # smaller singular values may end below the final interval
_CUSHION = 0.024  # least ratio of an interval's ends, so that the first steps bend no value towards 0
_SAFETY = 1.01  # values may exceed an interval by this factor, as rounding in bf16 makes them
_NARROW = 1e-4  # half the relative width of an interval in which Taylor's polynomial is as good as the best
_PRECISION = 12  # decimals of the coefficients: machines differ in the last digits of float64


def best_quintic(lower: float, upper: float) -> Quintic:
    """Return the odd quintic with the least error max |p(x) - 1| over [lower, upper], 0 < lower < upper.

    The error of the best one has the same size and alternating signs at four points (Chebyshev): both ends and the two
    extrema between them. Remez's algorithm solves for p at four points, then moves the inner two to its extrema.
    """
    if upper - lower <= 2 * _NARROW * upper:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5  # slope and curvature are 0 at `upper`
    points = np.linspace(lower, upper, 4)
    for _ in range(100):
        odd_powers = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)  # p(x) + sign * error = 1
        a, b, c, _error = np.linalg.solve(odd_powers, np.ones(4))
        # The extrema, where p'(x) = a + 3 b x^2 + 5 c x^4 is 0.
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt(np.array([-3 * b - root, -3 * b + root]) / (10 * c))
        moved, points[1:3] = np.abs(points[1:3] - inner).max(), inner
        if moved <= 1e-12 * upper:
            break
    return float(a), float(b), float(c)


def quintics(steps: int) -> tuple[Quintic, ...]:
    """Return the coefficients of each step, for matrices whose norm is 1."""
    lower, upper, found = _LEAST, 1.0, []
    for step in range(steps):
        a, b, c = best_quintic(max(lower, _CUSHION * upper), upper)
        ends = [a * x + b * x**3 + c * x**5 for x in (lower, upper)]
        center = sum(ends) / 2  # 1, unless the cushion was used
        a, b, c = a / center, b / center, c / center
        lower, upper = ends[0] / center, ends[1] / center
        safety = _SAFETY if step < steps - 1 else 1.0  # no later step can amplify what the last one overshoots
        parts = (a / safety, b / safety**3, c / safety**5)
        found.append((round(parts[0], _PRECISION), round(parts[1], _PRECISION), round(parts[2], _PRECISION)))
    return tuple(found)
