"""Intervals hold the truth as often as they say, and comparisons of equals are significant as rarely as they say.

``benchmarks/interval_coverage.py`` is the full table; here are its cells with the fewest problems.
"""

from itertools import product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.evaluation import avg_per_problem, bootstrap_interval, paired_comparison
from oprd.evaluation.metrics import _proportion, _student

TRIALS, PROBLEMS, SAMPLES, RESAMPLES = 1500, 30, 16, 500
POPULATIONS = {  # how chances of problems are drawn, and their mean in percent
    "arcsine": (lambda rng, shape: rng.beta(0.5, 0.5, shape), 50),
    "hard": (lambda rng, shape: rng.beta(1, 3, shape), 25),
    "even": (lambda rng, shape: rng.beta(2, 2, shape), 50),
    "skewed": (lambda rng, shape: rng.beta(0.3, 1.2, shape), 20),
    "mixture": (lambda rng, shape: np.where(rng.random(shape) < 0.7, 0.05, 0.9), 30.5),
}
# pass@4 by the number of right answers among 16.
PASS_4 = np.array([100 * (1 - comb(16 - right, 4) / comb(16, 4)) for right in range(17)])
VALUES = np.random.default_rng(7).binomial(16, np.random.default_rng(8).beta(0.5, 2, 30)) / 16 * 100  # skewed
OTHER = np.clip(VALUES + np.random.default_rng(9).normal(6, 20, 30), 0, 100)  # a little better


def plain_percentile(values, seed):
    """The textbook percentile bootstrap."""
    resampled = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
    return np.quantile(resampled.mean(axis=1), [0.025, 0.975])


def coverage(intervals, truth):
    return 100 * np.mean([low - 1e-9 <= truth <= high + 1e-9 for low, high in intervals])


def draw(population, seed=0):
    rng = np.random.default_rng(seed)
    chances, mean = POPULATIONS[population]
    return rng, chances(rng, (TRIALS, PROBLEMS)), mean


@pytest.mark.parametrize("population", POPULATIONS)
def test_intervals_of_avg_hold_the_truth_where_plain_ones_do_not(population):
    rng, chances, truth = draw(population)
    values = rng.binomial(SAMPLES, chances) / SAMPLES * 100
    ours = coverage([bootstrap_interval(v, resamples=RESAMPLES, seed=i) for i, v in enumerate(values)], truth)
    plain = coverage([plain_percentile(v, i) for i, v in enumerate(values)], truth)
    assert 93 <= ours <= 97
    assert plain < ours - 1


def test_intervals_of_pass_at_4_hold_the_truth():
    """The hardest cell: most problems at 100, a tail to the left."""
    rng, chances, _ = draw("even")
    values = PASS_4[rng.binomial(SAMPLES, chances)]
    truth = 100 * (1 - 120 / 840)  # 1 - E (1 - p)^4 = 1 - (2 * 3 * 4 * 5) / (4 * 5 * 6 * 7)
    ours = coverage([bootstrap_interval(v, resamples=RESAMPLES, seed=i) for i, v in enumerate(values)], truth)
    assert 93 <= ours <= 97
    assert coverage([plain_percentile(v, i) for i, v in enumerate(values)], truth) < 93


def exact_coverage(intervals, share):
    """Chance that the interval of a binomial count holds ``share``, in percent."""
    count = len(intervals) - 1
    return 100 * sum(
        comb(count, hits) * share**hits * (1 - share) ** (count - hits)
        for hits, (low, high) in enumerate(intervals)
        if low <= share <= high
    )


@pytest.mark.parametrize("problems", [30, 83])
def test_intervals_of_proportions_hold_the_truth(problems):
    """Exactly, no simulation: Best@16 of four populations, and nowhere far below, up to shares next to 1."""
    intervals = [_proportion(hits / problems, problems, 0.95) for hits in range(problems + 1)]
    for share in (0.8601, 0.8421, 0.5864, 0.6919):
        assert 93 <= exact_coverage(intervals, share) <= 97
    shares = 1 - np.geomspace(0.1 / problems, 0.5, 200)
    assert min(exact_coverage(intervals, share) for share in shares) > 92
    assert 94 < np.mean([exact_coverage(intervals, share) for share in np.linspace(0.1, 0.9, 81)]) < 96


@pytest.mark.parametrize("population", ["arcsine", "skewed"])
def test_paired_intervals_and_p_values_hold_their_level(population):
    rng, chances, mean = draw(population)
    first, equal = (rng.binomial(SAMPLES, chances) / SAMPLES * 100 for _ in range(2))
    better = rng.binomial(SAMPLES, 1 - (1 - chances) * rng.uniform(0.75, 1, chances.shape)) / SAMPLES * 100
    for second, truth in ((equal, 0), (better, (100 - mean) / 8)):
        found = [
            paired_comparison(a, b, resamples=RESAMPLES, seed=i)
            for i, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        assert 93 <= coverage([(f.low, f.high) for f in found], truth) <= 97
        significant = 100 * np.mean([f.p_value < 0.05 for f in found])
        assert 2.5 <= significant <= 6 if truth == 0 else significant > 20


def test_interval_equals_a_textbook_bca():
    """Jackknife acceleration, bias correction by counting resamples, Student's t from its density."""
    count, mean = len(VALUES), VALUES.mean()
    without = np.array([np.delete(VALUES, i).mean() for i in range(count)])
    gaps = without.mean() - without
    acceleration = (gaps**3).sum() / (6 * (gaps**2).sum() ** 1.5)
    means = np.random.default_rng(1).choice(VALUES, (100_000, count)).mean(axis=1)
    normal = NormalDist()
    bias = normal.inv_cdf(((means < mean - 1e-9).mean() + (means < mean + 1e-9).mean()) / 2)
    grid = np.linspace(0, 4, 400_001)
    mass = np.cumsum((1 + grid**2 / (count - 1)) ** (-count / 2))
    tail_mass = ((1 + np.linspace(4, 400, 400_001) ** 2 / (count - 1)) ** (-count / 2)).sum() * 99
    quantile = grid[np.searchsorted(mass, 0.95 * (mass[-1] + tail_mass))]
    ends = []
    for side in (-1, 1):
        reach = bias + side * quantile
        ends.append(np.quantile(means, normal.cdf(bias + reach / (1 - acceleration * reach))))
    assert acceleration > 0.02  # else the correction would not show
    assert bootstrap_interval(VALUES, resamples=100_000) == pytest.approx(ends, abs=0.25)
    assert quantile == pytest.approx(_student(0.95, count - 1), abs=1e-3)


def test_paired_interval_equals_expanded_percentiles():
    differences = OTHER - VALUES
    means = np.random.default_rng(1).choice(differences, (400_000, 30)).mean(axis=1)
    tail = NormalDist().cdf(-2.04523 * sqrt(30 / 29))  # 2.5 % become 1.9 %
    found = paired_comparison(VALUES, OTHER, resamples=400_000)
    assert found.high - found.low == pytest.approx(np.subtract(*np.quantile(means, [1 - tail, tail])), rel=0.008)
    assert found.low + found.high == pytest.approx(np.quantile(means, [tail, 1 - tail]).sum(), abs=0.3)


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"), [(0.95, 4, 2.776), (0.95, 9, 2.2622), (0.99, 29, 2.7564), (0.9, 120, 1.6577)]
)
def test_students_quantile_is_that_of_the_tables(level, freedom, quantile):
    assert _student(level, freedom) == pytest.approx(quantile, rel=3e-3)


def test_proportions_by_hand():
    assert bootstrap_interval([100] * 18 + [0] * 12) == pytest.approx((42.32, 75.41), abs=0.01)  # Wilson
    assert bootstrap_interval([0] * 30) == pytest.approx((0, 11.35), abs=0.01)
    # One wrong: all 30 are right with a chance of 95 % at the upper end.
    assert bootstrap_interval([100] * 29 + [0])[1] == pytest.approx(100 * 0.95 ** (1 / 30))
    assert bootstrap_interval([1] * 18 + [0] * 12, bounds=(0, 1)) == pytest.approx((0.4232, 0.7541), abs=1e-4)
    assert bootstrap_interval([1] * 18 + [-1] * 12, bounds=(-1, 1)) == pytest.approx((-0.1536, 0.5082), abs=2e-4)
    low, high = bootstrap_interval([100] * 27 + [0] * 3)
    assert bootstrap_interval([0] * 27 + [100] * 3) == pytest.approx((100 - high, 100 - low))


def test_order_of_problems_does_not_matter():
    order = np.random.default_rng(0).permutation(len(VALUES))
    assert bootstrap_interval(VALUES) == bootstrap_interval(VALUES[order])
    assert paired_comparison(VALUES, OTHER) == paired_comparison(VALUES[order], OTHER[order])


@settings(max_examples=25, deadline=None)
@given(st.floats(-50, 50), st.floats(0.01, 100))
def test_intervals_move_and_stretch_with_their_values(shift, scale):
    def interval(values):
        return np.array(bootstrap_interval(values, bounds=None, resamples=300))

    assert interval(scale * VALUES + shift) == pytest.approx(scale * interval(VALUES) + shift, abs=1e-6)
    before = paired_comparison(VALUES, OTHER, resamples=300)
    after = paired_comparison(scale * VALUES + shift, scale * OTHER + shift, resamples=300)
    assert (after.low, after.high) == pytest.approx((scale * before.low, scale * before.high), abs=1e-6)
    assert after.p_value == before.p_value


def test_interval_stays_within_its_bounds():
    low, high = bootstrap_interval([100] * 29 + [6.25])
    assert 80 < low < 96.9 < high <= 100
    assert bootstrap_interval([0] * 6 + [50])[0] == 0  # rounding goes below
    assert bootstrap_interval(VALUES) == bootstrap_interval(VALUES, bounds=None)  # clipping has nothing to do
    with pytest.raises(ValueError, match="bounds=None"):
        bootstrap_interval([312.0, 87.0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-12.5, -6.25, 0, 6.25, 18.75]), min_size=1, max_size=9))
def test_p_value_is_the_share_of_sign_patterns(differences):
    far = abs(sum(differences))
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    found = paired_comparison([50] * len(differences), [50 + d for d in differences], resamples=10)
    assert found.p_value == pytest.approx(np.mean([abs(s) >= far for s in sums]))
    assert found.difference == pytest.approx(np.mean(differences))


@pytest.mark.parametrize("better", [11, 26])
def test_p_value_of_right_and_wrong_is_mcnemars(better):
    """16 pairs are enumerated, 40 drawn; the chance of a coin's tail either way."""
    pairs = {11: 16, 26: 40}[better]
    first = [0] * better + [100] * (pairs - better) + [100, 0, 100]
    second = [100] * better + [0] * (pairs - better) + [100, 0, 100]
    exact = 2 * sum(comb(pairs, i) for i in range(better, pairs + 1)) / 2**pairs
    found = paired_comparison(first, second, resamples=20_000)
    assert found.p_value == pytest.approx(exact, abs=1e-12 if pairs == 16 else 0.006)
    assert found.problems == pairs + 3


def test_monte_carlo_p_value_is_never_zero():
    assert paired_comparison(np.zeros(40), np.arange(1, 41), resamples=99).p_value == 1 / 100


def test_swapping_models_turns_the_comparison_round():
    one, two = paired_comparison(VALUES, OTHER), paired_comparison(OTHER, VALUES)
    assert 0.001 < one.p_value < 0.5  # not at an end, where any draws agree
    assert one.difference == pytest.approx(-two.difference)
    assert one.p_value == two.p_value
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low), abs=0.5)  # other resamples
    assert one.low < one.difference < one.high


def test_comparison_takes_samples_of_different_numbers():
    first, second = [[True, False]] * 3 + [[False, False]] * 4, [[True, True, False]] * 5 + [[False] * 3] * 2
    assert paired_comparison(first, second) == paired_comparison(avg_per_problem(first), avg_per_problem(second))


def test_problems_without_a_value_are_left_out():
    holes = np.concatenate([VALUES, [np.nan, np.nan]])
    assert bootstrap_interval(holes) == bootstrap_interval(VALUES)
    found = paired_comparison(holes, np.concatenate([OTHER, [50, np.nan]]))
    assert found == paired_comparison(VALUES, OTHER) and found.problems == 30


def test_one_problem_says_nothing_of_others():
    assert bootstrap_interval([[True, True]]) == bootstrap_interval([37.5]) == (0, 100)
    assert bootstrap_interval([412], bounds=None) == (412, 412)
    found = paired_comparison([25], [75])
    assert (found.difference, found.low, found.high, found.p_value, found.problems) == (50, 50, 50, 1, 1)


def test_without_spread():
    assert bootstrap_interval([412] * 9, bounds=None) == (412, 412)
    found = paired_comparison(VALUES, VALUES)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("level", [0.95, 0.9999])
def test_very_few_problems_give_finite_intervals(count, level):
    values = [0.0] * (count - 1) + [90.0]
    low, high = bootstrap_interval(values, level=level)
    assert 0 <= low < np.mean(values) < high <= 90


def test_what_is_refused():
    with pytest.raises(ValueError, match="same problems in the same order"):
        paired_comparison([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="score at least one"):
        paired_comparison([1, np.nan], [np.nan, 3])
    with pytest.raises(ValueError, match="score at least one"):
        bootstrap_interval([np.nan])
    with pytest.raises(ValueError, match="at least one of each"):
        paired_comparison([], [])
    with pytest.raises(ValueError, match="0 < level < 1"):
        bootstrap_interval(VALUES, level=95)
    with pytest.raises(ValueError, match="resamples >= 1"):
        paired_comparison(VALUES, VALUES, resamples=0)
