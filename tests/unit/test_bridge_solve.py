import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.bridge.moments import Moments
from oprd.bridge.solve import principal_directions, solve, theorem_rank

RIDGE = 1e-8


def uneven(n, width, *, mean=1.0, generator):
    """Rows with an uneven spectrum in a rotated basis, around a mean."""
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    rows = torch.randn(n, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, width).double()
    return rows @ basis + mean * torch.randn(width, generator=generator, dtype=torch.float64)


def pair_of_rows(n=400, student_dim=6, teacher_dim=8, *, noise=0.3, seed=0, mean=1.0):
    generator = torch.Generator().manual_seed(seed)
    student = uneven(n, student_dim, mean=mean, generator=generator)
    linear = torch.randn(student_dim, teacher_dim, generator=generator, dtype=torch.float64)
    teacher = student @ linear * torch.logspace(0.5, -1, teacher_dim).double() + 3
    return student, teacher + noise * torch.randn(teacher.shape, generator=generator, dtype=torch.float64)


def moments_of(student, teacher):
    moments = Moments.empty(student.shape[1], teacher.shape[1])
    moments.update(student, teacher)
    return moments


def predicted(solution, student):
    """The student's side of the bridge."""
    return (student if solution.student_mean is None else student - solution.student_mean) @ solution.student_map.T


def target(solution, teacher):
    return (teacher - solution.teacher_mean) @ solution.directions.T


def eq_13(solution, student, teacher, rank):
    """Mean over rows of the squared distance in the first ``rank`` dimensions."""
    return (predicted(solution, student) - target(solution, teacher))[:, :rank].pow(2).sum(1).mean().item()


# ------------------------------------------------------------------------------------------------ Eq. 12


def test_directions_are_the_pca_up_to_sign():
    _, teacher = pair_of_rows()
    directions, variance = principal_directions(moments_of(*pair_of_rows()))
    _, scale, reference = torch.linalg.svd(teacher - teacher.mean(0), full_matrices=False)
    torch.testing.assert_close((directions * reference).sum(1).abs(), torch.ones(8).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(variance, scale**2 / len(teacher), rtol=1e-9, atol=1e-12)
    assert variance.tolist() == sorted(variance.tolist(), reverse=True)
    torch.testing.assert_close(directions @ directions.T, torch.eye(8).double(), rtol=0, atol=1e-12)
    assert all(row[row.abs().argmax()] > 0 for row in directions)


def test_a_teacher_of_low_rank_has_no_negative_variance():
    student, teacher = pair_of_rows()
    _, variance = principal_directions(moments_of(student, torch.cat([teacher[:, :2]] * 4, 1)))
    assert bool((variance >= 0).all())
    assert variance[2:].max() < 1e-12 * variance[0]


# ------------------------------------------------------------------------------------------------ Eq. 13


@pytest.mark.parametrize("seed", range(3))
def test_with_an_intercept_it_is_lstsq_with_a_column_of_ones(seed):
    student, teacher = pair_of_rows(seed=seed)
    solution = solve(moments_of(student, teacher), ridge=0.0, intercept=True)
    ones = torch.cat([student, torch.ones(len(student), 1).double()], 1)
    twin = torch.linalg.lstsq(ones, target(solution, teacher)).solution
    torch.testing.assert_close(solution.student_map, twin[:-1].T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(predicted(solution, student), ones @ twin, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_without_an_intercept_it_is_lstsq_on_the_rows(seed):
    student, teacher = pair_of_rows(seed=seed)
    solution = solve(moments_of(student, teacher), ridge=0.0, intercept=False)
    assert solution.student_mean is None
    twin = torch.linalg.lstsq(student, target(solution, teacher)).solution
    torch.testing.assert_close(solution.student_map, twin.T, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_is_lstsq_with_rows_of_its_own(intercept):
    """``ridge * s * ||P||^2`` is d_S more rows of ``sqrt(n * ridge * s)``, s the mean of the regression's diagonal."""
    student, teacher = pair_of_rows()
    solution = solve(moments_of(student, teacher), ridge=0.1, intercept=intercept)
    rows = student - student.mean(0) if intercept else student
    scale = (len(rows) * 0.1 * rows.pow(2).mean()).sqrt()
    more = torch.cat([rows, scale * torch.eye(6).double()])
    aims = torch.cat([target(solution, teacher), torch.zeros(6, 8).double()])
    torch.testing.assert_close(solution.student_map, torch.linalg.lstsq(more, aims).solution.T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_means_the_same_at_any_scale(intercept):
    student, teacher = pair_of_rows()
    one = solve(moments_of(student, teacher), ridge=0.1, intercept=intercept)
    other = solve(moments_of(student * 1000, teacher), ridge=0.1, intercept=intercept)
    torch.testing.assert_close(predicted(other, student * 1000), predicted(one, student), rtol=1e-8, atol=1e-10)
    plain = solve(moments_of(student, teacher), ridge=0.0, intercept=intercept)
    assert one.student_map.norm() < 0.95 * plain.student_map.norm()


def adamw(student, targets, *, bias):
    """The paper's way to the student's maps: 20 epochs at 1e-3, here in minibatches of 512."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(student.shape[1], targets.shape[1], bias=bias, dtype=torch.float64)
    optimiser = torch.optim.AdamW(linear.parameters(), lr=1e-3)
    for _ in range(20):
        for rows in torch.randperm(len(student)).split(512):
            optimiser.zero_grad()
            (linear(student[rows]) - targets[rows]).pow(2).sum(1).mean().backward()
            optimiser.step()
    return linear.requires_grad_(False)


@pytest.mark.parametrize("intercept", [True, False])
def test_closed_form_is_never_above_20_epochs_of_adamw(intercept):
    """The targets are scaled so that AdamW comes near the minimum: a rival that never starts would prove nothing."""
    mean = 0.0 if not intercept else 0.3
    student, teacher = pair_of_rows(8192, 16, 24, noise=0.1, mean=mean)
    teacher = teacher / 12
    train, held_out = slice(0, 6144), slice(6144, None)
    solution = solve(moments_of(student[train], teacher[train]), ridge=RIDGE, intercept=intercept)
    targets = target(solution, teacher)
    for rank in (1, 4, 16):
        rival = adamw(student[train], targets[train, :rank], bias=intercept)
        trained, tested = (
            (rival(student[rows]) - targets[rows, :rank]).pow(2).sum(1).mean().item() for rows in (train, held_out)
        )
        variance = targets[train, :rank].pow(2).sum(1).mean().item()
        assert trained < 0.5 * variance
        assert eq_13(solution, student[train], teacher[train], rank) <= trained * (1 + 1e-9)
        assert eq_13(solution, student[held_out], teacher[held_out], rank) <= tested * 1.02


@pytest.mark.parametrize("intercept", [True, False])
def test_no_step_away_from_the_minimum_helps(intercept):
    student, teacher = pair_of_rows()
    solution = solve(moments_of(student, teacher), ridge=0.0, intercept=intercept)
    least = eq_13(solution, student, teacher, 8)
    for seed in range(20):
        step = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1e-3
        solution.student_map.add_(step)
        assert eq_13(solution, student, teacher, 8) > least
        solution.student_map.sub_(step)


def deficient(seed=0, n=500):
    """Student rows that span 6 of 8 dimensions, around a mean."""
    student, teacher = pair_of_rows(n, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    return torch.cat([student, student[:, :2] @ torch.randn(2, 2, generator=generator).double()], 1), teacher


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_rank_deficient_students_reach_the_least_loss(seed, intercept):
    student, teacher = deficient(seed)
    solution = solve(moments_of(student, teacher), ridge=RIDGE, intercept=intercept)
    rows = student - student.mean(0) if intercept else student
    twin = torch.linalg.lstsq(rows, target(solution, teacher), driver="gelsd").solution
    least = (rows @ twin - target(solution, teacher)).pow(2).sum(1).mean().item()
    assert eq_13(solution, student, teacher, 8) == pytest.approx(least, rel=1e-5)
    assert solution.student_map.norm() < 1.01 * twin.norm()


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_rank_deficient_students_without_ridge_get_the_least_norm(seed, intercept):
    """A singular matrix can pass a factorisation by rounding; its solution would be noise over noise."""
    student, teacher = deficient(seed)
    solution = solve(moments_of(student, teacher), ridge=0.0, intercept=intercept)
    rows = student - student.mean(0) if intercept else student
    twin = torch.linalg.lstsq(rows, target(solution, teacher), driver="gelsd", rcond=1e-10).solution
    torch.testing.assert_close(solution.student_map, twin.T, rtol=1e-5, atol=1e-6)


def test_fewer_rows_than_dimensions():
    student, teacher = pair_of_rows(4)
    solution = solve(moments_of(student, teacher), ridge=RIDGE, intercept=True)
    torch.testing.assert_close(predicted(solution, student), target(solution, teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.3, 700.0])
def test_a_constant_student_explains_nothing(value):
    _, teacher = pair_of_rows()
    moments = moments_of(torch.full((400, 6), value), teacher)
    solution = solve(moments, ridge=RIDGE, intercept=True)
    assert solution.r_squared(moments).max() < 1e-6
    assert predicted(solution, torch.full((3, 6), value).double()).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------ R^2


def r_squared_of_rows(solution, student, teacher):
    """Per direction: mean squared error over the variance around these rows' own mean."""
    aim = target(solution, teacher)
    error = (predicted(solution, student) - aim).pow(2).mean(0)
    return 1 - error / (aim - aim.mean(0)).pow(2).mean(0), error


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("rows", ["own", "others", "another mean"])
def test_r_squared_equals_the_rows(rows, intercept):
    student, teacher = pair_of_rows()
    solution = solve(moments_of(student, teacher), ridge=RIDGE, intercept=intercept)
    if rows != "own":
        student, teacher = pair_of_rows(150, seed=7)
    if rows == "another mean":
        student, teacher = student + 2.5, teacher - 4
    moments = moments_of(student, teacher)
    expected, error = r_squared_of_rows(solution, student, teacher)
    torch.testing.assert_close(solution.residual(moments), error, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.r_squared(moments), expected, rtol=1e-9, atol=1e-9)
    if rows == "own":
        assert bool((expected <= 1).all())
    if rows == "own" and intercept:
        assert bool((expected > 0).all())
    if rows == "another mean":
        assert expected.min() < -1


def test_directions_without_variance_explain_nothing():
    student, teacher = pair_of_rows(noise=0.0)
    moments = moments_of(student, torch.cat([teacher[:, :3], torch.full((400, 2), 5.0).double()], 1))
    r_squared = solve(moments, ridge=RIDGE, intercept=True).r_squared(moments)
    assert bool((r_squared[:3] > 0.999).all())
    assert r_squared[3:].tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------ Theorem 3


def theorem_error(variances, r_squared, rank):
    """Theorem 3 in words: signal given up behind the rank, noise taken in before it, each layer over its variance."""
    error = 0.0
    for variance, rho in zip(variances, r_squared, strict=True):
        rho = [max(r, 0) for r in rho]  # a direction where the student does harm has no signal, and no less than none
        lost = sum(lam * r for lam, r in zip(variance[rank:], rho[rank:], strict=True))
        noise = sum(lam * (1 - r) for lam, r in zip(variance[:rank], rho[:rank], strict=True))
        error += (lost + noise) / sum(variance)
    return error


def six(low):
    return st.lists(st.floats(low, 1), min_size=6, max_size=6)


@settings(max_examples=50, deadline=None)
@given(
    layers=st.lists(st.tuples(six(0.001), six(-3)), min_size=1, max_size=3),
    highest=st.integers(1, 6),
)
def test_theorem_rank_is_the_best_by_brute_force(layers, highest):
    variances = [sorted(variance, reverse=True) for variance, _ in layers]
    r_squared = [rho for _, rho in layers]
    rank = theorem_rank(*([torch.tensor(x).double() for x in side] for side in (variances, r_squared)), highest)
    errors = [theorem_error(variances, r_squared, r) for r in range(1, highest + 1)]
    assert 1 <= rank <= highest
    assert errors[rank - 1] <= min(errors) + 1e-9


def test_theorem_rank_is_where_a_falling_r_squared_crosses_a_half():
    variance = torch.logspace(0, -3, 10).double()
    for crossing in range(1, 10):
        rho = torch.cat([torch.linspace(0.99, 0.51, crossing), torch.linspace(0.49, 0.01, 10 - crossing)]).double()
        assert theorem_rank([variance], [rho], 10) == crossing
    assert theorem_rank([variance], [torch.full((10,), 0.9).double()], 10) == 10
    assert theorem_rank([variance], [torch.full((10,), 0.9).double()], 4) == 4
    assert theorem_rank([variance], [torch.full((10,), -5.0).double()], 10) == 1


def test_one_direction_that_does_harm_does_not_hide_the_rest():
    assert theorem_rank([torch.ones(5)], [torch.tensor([0.9, -5.0, 0.9, 0.9, 0.9])], 5) == 5


def test_theorem_rank_hears_every_layer_alike():
    """A layer of a thousand times the scale has no more to say than the others."""
    variance = torch.tensor([4.0, 3.0, 2.0, 1.0]).double()
    few, all_four = torch.tensor([0.9, 0.2, 0.2, 0.2]).double(), torch.tensor([0.9, 0.9, 0.9, 0.9]).double()
    assert theorem_rank([variance * 1e6, variance, variance], [few, all_four, all_four], 4) == 4
    assert theorem_rank([variance * 1e6, variance * 1e6, variance], [few, few, all_four], 4) == 1
