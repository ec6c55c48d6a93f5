from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.evaluation import (
    avg_at_k,
    avg_per_problem,
    best_at_k,
    best_per_problem,
    bootstrap_interval,
    distinct_n,
    distinct_per_problem,
    pass_at_k,
    pass_per_problem,
)

CORRECT = [
    [True, False, False, False],
    [True, True, True, True],
    [False, False, False, False],
    [False, True, True, False],
]


@st.composite
def scores(draw):
    samples = draw(st.integers(1, 6))
    return draw(st.lists(st.lists(st.booleans(), min_size=samples, max_size=samples), min_size=1, max_size=4))


def test_by_hand():
    assert avg_at_k(CORRECT) == pytest.approx(100 * 7 / 16)
    assert best_at_k(CORRECT) == pytest.approx(75)
    assert pass_at_k(CORRECT, 2) == pytest.approx(100 * (3 / 6 + 1 + 0 + 5 / 6) / 4)


@given(scores())
def test_averages_equal_the_loops(correct):
    assert avg_at_k(correct) == pytest.approx(100 * sum(map(sum, correct)) / (len(correct) * len(correct[0])))
    assert best_at_k(correct) == pytest.approx(100 * sum(map(any, correct)) / len(correct))


@given(scores(), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(correct, data):
    k = data.draw(st.integers(1, len(correct[0])))
    shares = []
    for row in correct:
        subsets = list(combinations(row, k))
        shares.append(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(correct, k) == pytest.approx(100 * sum(shares) / len(shares))


@given(scores())
def test_pass_at_k_meets_the_other_two_at_its_ends(correct):
    assert pass_at_k(correct, 1) == pytest.approx(avg_at_k(correct))
    assert pass_at_k(correct, len(correct[0])) == pytest.approx(best_at_k(correct))


def test_per_problem_by_hand():
    assert avg_per_problem(CORRECT).tolist() == [25, 100, 0, 50]
    assert best_per_problem(CORRECT).tolist() == [100, 100, 0, 100]
    assert pass_per_problem(CORRECT, 2) == pytest.approx([50, 100, 0, 500 / 6])
    assert distinct_per_problem([["a b", "c"], ["x"], ["x x x", "x"]], n=2) == pytest.approx(
        [100, np.nan, 50], nan_ok=True
    )


@given(scores(), st.data())
def test_metrics_are_means_of_their_per_problem_values(correct, data):
    k = data.draw(st.integers(1, len(correct[0])))
    for metric, per_problem in (
        (avg_at_k, avg_per_problem),
        (best_at_k, best_per_problem),
        (lambda rows: pass_at_k(rows, k), lambda rows: pass_per_problem(rows, k)),
    ):
        values = per_problem(correct)
        assert values.shape == (len(correct),)
        assert values == pytest.approx([metric([row]) for row in correct])  # no problem looks at another
        assert metric(correct) == pytest.approx(sum(values) / len(values))


def test_distinct_n_by_hand():
    assert distinct_n([["a b c d e"]]) == 100
    assert distinct_n([["a a a a a"]]) == 50  # one 4-gram, twice
    # Pooled over the samples of a problem: ab bc | ab bd -> 3 of 4.
    assert distinct_n([["a b c", "a  b\nd"]], n=2) == 75
    # Mean over problems, not over grams: 1/2 and 1.
    assert distinct_n([["a a a"], ["a b c d e f"]], n=2) == 75
    assert distinct_n([["x y", "x y"]], n=1) == 50


def test_distinct_n_leaves_short_problems_out():
    assert distinct_n([["a b c"], ["a a a a a", "b"]]) == 50
    assert distinct_n([["a b c"], [""]]) == 0
    assert distinct_n([]) == 0


def test_interval_is_deterministic_and_holds_the_mean():
    low, high = bootstrap_interval(CORRECT)
    assert (low, high) == bootstrap_interval(CORRECT)
    assert (low, high) != bootstrap_interval(CORRECT, seed=1, resamples=50)
    assert 0 <= low < avg_at_k(CORRECT) < high <= 100


def test_interval_narrows_with_problems_and_with_the_level():
    def width(interval):
        return interval[1] - interval[0]

    few = width(bootstrap_interval(CORRECT * 8))
    many = width(bootstrap_interval(CORRECT * 128))
    assert many == pytest.approx(few / 4, rel=0.1)  # 16 times the problems, a quarter of the width
    assert width(bootstrap_interval(CORRECT * 128, level=0.5)) < many / 2


def test_interval_of_a_binary_score_is_near_the_normal_one():
    correct = [[True]] * 120 + [[False]] * 80
    low, high = bootstrap_interval(correct)
    error = 100 * (0.6 * 0.4 / 200) ** 0.5
    assert low == pytest.approx(60 - 1.96 * error, abs=0.75)
    assert high == pytest.approx(60 + 1.96 * error, abs=0.75)


def test_interval_resamples_problems_not_samples():
    """More samples that say the same thing are no more evidence."""
    once, often = [[True], [False], [True]] * 5, [[True] * 8, [False] * 8, [True] * 8] * 5
    assert bootstrap_interval(once) == bootstrap_interval(often)


def test_interval_of_equal_problems_is_not_a_point():
    """All right on 30 problems does not make a model that is always right."""
    low, high = bootstrap_interval([[True] * 16] * 30)
    assert (low, high) == (pytest.approx(100 * 30 / (30 + 1.95996**2), abs=1e-3), 100)
    low, high = bootstrap_interval([[True, False]] * 7)
    assert low < 25 and high > 75


def test_interval_of_another_metric_takes_its_per_problem_values():
    correct = CORRECT * 10
    low, high = bootstrap_interval(pass_per_problem(correct, 2))
    assert low < pass_at_k(correct, 2) < high
    assert bootstrap_interval(avg_per_problem(correct)) == bootstrap_interval(correct)


@pytest.mark.parametrize("score", [avg_at_k, best_at_k, bootstrap_interval, lambda correct: pass_at_k(correct, 1)])
@pytest.mark.parametrize("correct", [[], [[]], [True, False]])
def test_refuses_what_is_not_problems_by_samples(score, correct):
    with pytest.raises(ValueError, match="problems x samples"):
        score(correct)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_pass_at_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=rf"pass@{k} needs 1 <= k <= 4"):
        pass_at_k(CORRECT, k)
