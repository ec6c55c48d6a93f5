import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.evaluation import Verdict, bootstrap_interval, paired_comparison
from oprd.evaluation.summary import Evaluation, Graded, graded_of, paired

RIGHT, WRONG, NO_BOX, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.NO_BOX, Verdict.UNDECIDED


def graded(index, sample, verdict=RIGHT, *, tokens=3, cut_off=False, response="a b c d", problem=None):
    boxed = None if verdict == NO_BOX else "1"
    problem = f"id{index}" if problem is None else problem
    return Graded(problem, index, sample, 0, "1", boxed, str(verdict), tokens, cut_off, response)


BY_HAND = [
    graded(0, 0, RIGHT, tokens=3, response="a b c d"),
    graded(0, 1, WRONG, tokens=5, response="a b c d"),
    graded(0, 2, NO_BOX, tokens=10, cut_off=True, response="a b c d e"),
    graded(0, 3, WRONG, tokens=2, response="a b"),
    graded(1, 0, UNDECIDED, tokens=10, cut_off=True, response="x x x x x x"),
    graded(1, 1, NO_BOX, tokens=10, cut_off=True, response="x"),
    graded(1, 2, WRONG, tokens=1, response=""),
    graded(1, 3, WRONG, tokens=7, response="y y y"),
    graded(2, 0, RIGHT, tokens=4, response="a"),
    graded(2, 1, RIGHT, tokens=4, response="b"),
    graded(2, 2, WRONG, tokens=4, response="c d e"),
    graded(2, 3, RIGHT, tokens=4, response="d"),
]


def test_by_hand():
    evaluation = Evaluation.of(BY_HAND)
    assert evaluation.ids == ["id0", "id1", "id2"]
    assert evaluation.correct == [[True, False, False, False], [False] * 4, [True, True, False, True]]
    assert evaluation.lengths == [[3, 5, 10, 2], [10, 10, 1, 7], [4, 4, 4, 4]]
    assert evaluation.values("avg_at_k").tolist() == [25, 0, 75]
    assert evaluation.values("best_at_k").tolist() == [100, 0, 100]
    assert evaluation.values("pass_at_1").tolist() == [25, 0, 75]
    assert evaluation.values("pass_at_2") == pytest.approx([50, 0, 100])
    assert evaluation.values("pass_at_4").tolist() == [100, 0, 100]
    assert evaluation.values("distinct_4") == pytest.approx([50, 100 / 3, np.nan], nan_ok=True)
    assert evaluation.values("mean_length").tolist() == [5, 7, 4]
    assert evaluation.values("cut_off").tolist() == [25, 50, 0]
    assert evaluation.values("no_box").tolist() == [25, 25, 0]
    assert evaluation.values("undecided").tolist() == [0, 25, 0]
    made = evaluation.summary()
    shares = {name: made.pop(name) for name in ("problems", "samples", "cut_off", "no_box", "undecided", "tokens")}
    assert shares == pytest.approx(
        {"problems": 3, "samples": 4, "cut_off": 25, "no_box": 50 / 3, "undecided": 25 / 3, "tokens": 64}
    )
    means = {"avg_at_k": 100 / 3, "best_at_k": 200 / 3, "pass_at_1": 100 / 3, "pass_at_2": 50}
    means |= {"distinct_4": 125 / 3, "mean_length": 16 / 3}
    assert {name: estimate["value"] for name, estimate in made.items()} == pytest.approx(means)
    for name, estimate in made.items():
        bounds = None if name == "mean_length" else (0, 100)
        values = [value for value in evaluation.values(name) if value == value]
        assert (estimate["low"], estimate["high"]) == bootstrap_interval(values, bounds=bounds)
        assert estimate["low"] <= estimate["value"] <= estimate["high"]


@pytest.mark.parametrize(("samples", "ks"), [(1, []), (2, [1]), (3, [1, 2]), (4, [1, 2]), (5, [1, 2, 4]), (16, [1, 2, 4, 8])])  # fmt: skip
def test_pass_at_powers_of_two_below_the_samples(samples, ks):
    made = Evaluation.of(graded(i, j) for i in range(2) for j in range(samples)).summary()
    assert [name for name in made if name.startswith("pass")] == [f"pass_at_{k}" for k in ks]


def test_answers_too_short_for_any_n_gram():
    made = Evaluation.of(graded(i, j, response="a b") for i in range(2) for j in range(2)).summary()
    assert made["distinct_4"] == {"value": None, "low": None, "high": None}


@st.composite
def answers(draw):
    samples = draw(st.integers(1, 5))
    one = st.builds(
        graded,
        st.just(0),
        st.just(0),
        st.sampled_from(list(Verdict)),
        tokens=st.integers(0, 40),
        cut_off=st.booleans(),
        response=st.text("ab ", max_size=14),
    )
    rows = draw(st.lists(st.lists(one, min_size=samples, max_size=samples), min_size=1, max_size=5))
    return [replace(a, index=i, sample=j, problem=f"id{i}") for i, row in enumerate(rows) for j, a in enumerate(row)]


def mean(values):
    return sum(values) / len(values)


def n_grams(row):
    words = [answer.response.split() for answer in row]
    return [" ".join(line[start : start + 4]) for line in words for start in range(len(line)) if start + 4 <= len(line)]


TWINS = {
    "avg_at_k": lambda row: 100 * mean([a.verdict == "right" for a in row]),
    "best_at_k": lambda row: 100 if "right" in [a.verdict for a in row] else 0,
    "pass_at_2": lambda row: 100 * mean([any(a.verdict == "right" for a in pair) for pair in combinations(row, 2)]),
    "distinct_4": lambda row: 100 * len(set(n_grams(row))) / len(n_grams(row)) if n_grams(row) else np.nan,
    "mean_length": lambda row: mean([a.tokens for a in row]),
    "cut_off": lambda row: 100 * mean([a.cut_off for a in row]),
    "no_box": lambda row: 100 * mean([a.verdict == "no box" for a in row]),
    "undecided": lambda row: 100 * mean([a.verdict == "undecided" for a in row]),
}


@settings(deadline=None)
@given(answers(), st.randoms())
def test_values_equal_the_loops_whatever_the_order_of_rows(rows, generator):
    problems = [[a for a in rows if a.index == i] for i in range(rows[-1].index + 1)]
    shuffled = rows[:]
    generator.shuffle(shuffled)
    evaluation = Evaluation.of(iter(shuffled))
    assert evaluation == Evaluation.of(rows)
    assert evaluation.answers == tuple(map(tuple, problems))
    for metric, twin in TWINS.items():
        if metric != "pass_at_2" or len(problems[0]) > 1:
            values = evaluation.values(metric)
            assert values.tolist() == pytest.approx([twin(row) for row in problems], nan_ok=True), metric


@settings(max_examples=15, deadline=None)
@given(answers(), st.randoms())
def test_the_summary_knows_no_order(rows, generator):
    shuffled = generator.sample(rows, len(rows))
    assert Evaluation.of(shuffled).summary() == Evaluation.of(rows).summary()


@pytest.mark.parametrize("metric", ["avg", "pass_at_", "pass_at_k", "pass_at_-1", "pass_at_1.5"])
def test_an_unknown_metric_is_refused(metric):
    with pytest.raises(ValueError, match=r"no metric .* give avg_at_k, .*pass_at_N"):
        Evaluation.of(BY_HAND).values(metric)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs"):
        Evaluation.of(BY_HAND).values(f"pass_at_{k}")


@pytest.mark.parametrize(("rows", "found"), [([], r"\[\]"), (BY_HAND[:-1], r"\[3, 4\]"), (BY_HAND[3:], r"\[1, 4\]")])
def test_unequal_samples_are_refused(rows, found):
    with pytest.raises(ValueError, match=f"same number of samples, at least one; found {found}"):
        Evaluation.of(rows)


def test_a_line_and_back():
    for answer in BY_HAND:
        assert graded_of(answer.as_row()) == answer
    row = BY_HAND[0].as_row()
    for broken in (row | {"more": 1}, {name: value for name, value in row.items() if name != "tokens"}):
        with pytest.raises(ValueError, match=r"not a line of an evaluation .*(more|tokens)"):
            graded_of(broken)


# Pairs


def moved(rows, order):
    """The same answers with the problems in another order."""
    return Evaluation.of(replace(answer, index=order[answer.index]) for answer in rows)


@settings(max_examples=25, deadline=None)
@given(answers(), st.data())
def test_pairs_match_by_id(rows, data):
    count = rows[-1].index + 1
    order = data.draw(st.permutations(range(count)))
    generator = random.Random(data.draw(st.integers(0, 99)))
    second = [replace(a, verdict=str(generator.choice(list(Verdict))), tokens=a.tokens + a.index) for a in rows]
    for metric in ("avg_at_k", "mean_length"):
        ours = [TWINS[metric]([a for a in rows if a.index == i]) for i in range(count)]
        theirs = [TWINS[metric]([a for a in second if a.index == i]) for i in range(count)]
        made = paired(Evaluation.of(rows), moved(second, order), metric)
        expected = paired_comparison(ours, theirs)
        assert made.problems == count
        assert made.difference == pytest.approx(mean(theirs) - mean(ours), abs=1e-9)
        assert (made.low, made.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert made.p_value == pytest.approx(expected.p_value)


def test_second_minus_first():
    one = Evaluation.of(graded(i, 0, WRONG, tokens=3) for i in range(8))
    two = Evaluation.of(graded(i, 0, RIGHT, tokens=2) for i in range(8))
    assert paired(one, two, "avg_at_k").difference == 100
    assert paired(two, one, "avg_at_k").difference == -100
    assert paired(one, two, "mean_length").difference == -1
    assert paired(one, one, "avg_at_k").p_value == 1 > paired(one, two, "avg_at_k").p_value


def test_problems_without_a_value_are_left_out():
    one = Evaluation.of(graded(i, 0, response="a b c d") for i in range(3))
    two = Evaluation.of(graded(i, 0, response="a b" if i == 1 else "a a a a a") for i in range(3))
    made = paired(one, two, "distinct_4")
    assert (made.problems, made.difference) == (2, -50)


@pytest.mark.parametrize(("others", "alone"), [(["id0", "id1"], 1), (["id0", "id1", "other"], 2), (["a", "b", "c"], 6)])
def test_different_problems_are_refused(others, alone):
    second = Evaluation.of(graded(i, 0, problem=name) for i, name in enumerate(others))
    message = rf"before and after answered different problems \({alone} are in one of them only\)"
    with pytest.raises(ValueError, match=message):
        paired(Evaluation.of(BY_HAND), second, "avg_at_k", names=("before", "after"))
