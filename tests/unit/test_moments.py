from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.bridge.moments import Moments

N, STUDENT, TEACHER = 60, 5, 7


def rows_of(n=N, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, STUDENT, generator=generator) * torch.logspace(0, -1, STUDENT) + 2
    return student.to(dtype), (torch.randn(n, TEACHER, generator=generator) - 1).to(dtype)


def moments_of(*chunks):
    moments = Moments.empty(STUDENT, TEACHER)
    for student, teacher in chunks:
        moments.update(student, teacher)
    return moments


def assert_same(one, other, rtol=1e-12):
    assert one.count == other.count
    for name, sums in one.tensors().items():
        torch.testing.assert_close(sums, other.tensors()[name], rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_equal_the_loop_over_rows(dtype):
    student, teacher = rows_of(dtype=dtype)
    moments = moments_of((student, teacher))
    loop = {name: torch.zeros_like(sums) for name, sums in moments.tensors().items()}
    for s, t in zip(student.double(), teacher.double(), strict=True):
        loop["student_sum"] += s
        loop["teacher_sum"] += t
        loop["student_student"] += torch.outer(s, s)
        loop["student_teacher"] += torch.outer(s, t)
        loop["teacher_teacher"] += torch.outer(t, t)
    assert moments.count == N
    assert set(loop) == {"student_sum", "teacher_sum", "student_student", "student_teacher", "teacher_teacher"}
    for name, sums in moments.tensors().items():
        assert sums.dtype == torch.float64
        torch.testing.assert_close(sums, loop[name], rtol=1e-12, atol=1e-12)


def test_means_and_covariances_equal_those_of_the_rows():
    student, teacher = (rows.double() for rows in rows_of())
    moments = moments_of((student, teacher))
    own, other = student - student.mean(0), teacher - teacher.mean(0)
    for got, expected in (
        (moments.student_mean, student.mean(0)),
        (moments.teacher_mean, teacher.mean(0)),
        (moments.teacher_covariance(), other.T @ other / N),
        (moments.student_gram(centred=True), own.T @ own / N),
        (moments.student_gram(centred=False), student.T @ student / N),
        (moments.cross_covariance(), own.T @ other / N),
        (moments.cross_covariance(), student.T @ other / N),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=6), order=st.permutations(range(N)), fitters=st.integers(1, 4))
def test_chunks_order_and_merging_do_not_matter(cuts, order, fitters):
    student, teacher = (rows[list(order)] for rows in rows_of())
    edges = [0, *sorted(cuts), N]
    parts = [Moments.empty(STUDENT, TEACHER) for _ in range(fitters)]
    for place, (start, end) in enumerate(pairwise(edges)):
        parts[place % fitters].update(student[start:end], teacher[start:end])
    merged = parts.pop()
    for part in parts:
        merged.merge(part)
    assert_same(merged, moments_of(rows_of()))


def test_merging_leaves_the_other_as_it_was():
    one, other, same = moments_of(rows_of(seed=1)), moments_of(rows_of(seed=2)), moments_of(rows_of(seed=2))
    one.merge(other)
    one.update(*rows_of(seed=3))
    assert_same(other, same, rtol=0)
    assert_same(one, moments_of(rows_of(seed=1), rows_of(seed=2), rows_of(seed=3)))


def test_memory_does_not_depend_on_rows():
    def numbers(moments):
        return sum(sums.untyped_storage().nbytes() for sums in moments.tensors().values()) // 8

    expected = STUDENT + TEACHER + STUDENT**2 + STUDENT * TEACHER + TEACHER**2
    assert numbers(Moments.empty(STUDENT, TEACHER)) == expected
    assert numbers(moments_of(rows_of(10))) == numbers(moments_of(*[rows_of(1000)] * 3)) == expected


def test_autocast_does_not_reach_the_sums():
    """Collection runs under the training's autocast; a bf16 product of rows would be a wrong covariance."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = moments_of(rows_of())
    assert_same(moments, moments_of(rows_of()), rtol=0)


def test_sums_keep_no_graph():
    student, teacher = rows_of()
    moments = moments_of((student.requires_grad_(), teacher.requires_grad_()))
    assert not any(sums.requires_grad for sums in moments.tensors().values())


def test_large_means_keep_the_covariance():
    """Massive activations: one dimension 10,000 times the spread of the others."""
    student, teacher = (rows.double() for rows in rows_of(2000))
    student[:, 0] += 1e4
    teacher[:, 3] += 1e4
    moments = moments_of((student, teacher))
    for got, rows in ((moments.student_gram(centred=True), student), (moments.teacher_covariance(), teacher)):
        torch.testing.assert_close(got, torch.cov(rows.T, correction=0), rtol=1e-6, atol=1e-6)
