from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.states import align_ends

OFFSETS = st.lists(st.integers(0, 9), max_size=9).map(sorted)


def naive_pairs(student, teacher):
    """For every offset: the first token that ends there with the first, the second with the second."""
    pairs = []
    for offset in sorted(set(student) | set(teacher)):
        own = [i for i, end in enumerate(student) if end == offset]
        other = [j for j, end in enumerate(teacher) if end == offset]
        pairs += zip(own, other, strict=False)
    return pairs


@given(student=OFFSETS, teacher=OFFSETS)
def test_pairs_equal_the_loop_over_offsets(student, teacher):
    assert align_ends(student, teacher) == naive_pairs(student, teacher)


@given(student=OFFSETS, teacher=OFFSETS)
def test_pairs_rise_on_both_sides(student, teacher):
    pairs = align_ends(student, teacher)
    for (i, j), (later_i, later_j) in pairwise(pairs):
        assert i < later_i
        assert j < later_j


@given(student=OFFSETS, teacher=OFFSETS)
def test_all_and_only_common_offsets(student, teacher):
    pairs = align_ends(student, teacher)
    assert all(student[i] == teacher[j] for i, j in pairs)
    assert {student[i] for i, _ in pairs} == set(student) & set(teacher)


@given(ends=OFFSETS)
def test_the_same_ends_are_the_identity(ends):
    assert align_ends(ends, ends) == [(i, i) for i in range(len(ends))]


@given(student=OFFSETS, teacher=OFFSETS)
def test_exchanging_the_sides_exchanges_the_pairs(student, teacher):
    assert align_ends(teacher, student) == [(j, i) for i, j in align_ends(student, teacher)]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ([], [], []),
        ([3], [], []),
        ([2, 5, 9], [5, 7, 9], [(1, 0), (2, 2)]),
        ([4, 4, 4], [4, 4], [(0, 0), (1, 1)]),
        ([0, 3, 3], [3, 3, 3, 6], [(1, 0), (2, 1)]),
        ([1, 3], [2, 4], []),
    ],
)
def test_pairs_by_hand(student, teacher, pairs):
    assert align_ends(student, teacher) == pairs


@pytest.mark.parametrize(
    ("student", "teacher", "side"),
    [([3, 2], [3], "student_ends"), ([3], [1, 5, 4], "teacher_ends"), ([9, 0], [], "student_ends")],
)
def test_falling_offsets_are_refused(student, teacher, side):
    with pytest.raises(ValueError, match=side):
        align_ends(student, teacher)
