import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.bridge import BridgeFitter
from oprd.bridge.report import cosine_by_rank
from oprd.bridge.solve import theorem_rank

MAP = [1, 3, 4]  # teacher layers of a student of three
STUDENT, TEACHER = 10, 14
HIGHEST = 10


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(n, width, *, seed):
    """Rows with a mean and an uneven spectrum in a rotated basis."""
    basis, _ = torch.linalg.qr(normal(width, width, seed=seed))
    return (normal(n, width, seed=seed + 1) * torch.logspace(0, -1, width).double()) @ basis + normal(
        width, seed=seed + 2
    )


def planted(rank, n=600, *, student_dim=STUDENT, teacher_dim=TEACHER, noise=0.0):
    """Per layer, a teacher that is a rank-r affine map of the student, with falling singular values."""
    student, teacher = [], []
    for layer in range(len(MAP)):
        own = uneven(n, student_dim, seed=100 * layer)
        left, right = normal(student_dim, rank, seed=100 * layer + 10), normal(rank, teacher_dim, seed=100 * layer + 11)
        other = own @ (left * torch.logspace(0, -0.7, rank).double()) @ right + normal(
            teacher_dim, seed=100 * layer + 12
        )
        student.append(own)
        teacher.append(other + noise * normal(n, teacher_dim, seed=100 * layer + 13))
    return torch.stack(student), torch.stack(teacher)


def fitter_of(*chunks, held_out=None, student_dim=STUDENT, teacher_dim=TEACHER, layer_map=MAP):
    fitter = BridgeFitter(layer_map, student_dim, teacher_dim)
    for chunk in chunks:
        fitter.update(*chunk)
    if held_out is not None:
        fitter.update(*held_out, held_out=True)
    return fitter


def split(states, at=450):
    """Rows for the fit and held-out rows."""
    student, teacher = states
    return (student[:, :at], teacher[:, :at]), (student[:, at:], teacher[:, at:])


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


# ------------------------------------------------------------------------------------------------ what is found


@pytest.mark.parametrize(("student_dim", "teacher_dim"), [(10, 14), (14, 10), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_planted_map_is_recovered(rank, student_dim, teacher_dim):
    student, teacher = planted(rank, student_dim=student_dim, teacher_dim=teacher_dim)
    bridge = fitter_of((student, teacher), student_dim=student_dim, teacher_dim=teacher_dim).fit(rank=rank)
    assert (bridge.rank, bridge.student_dim, bridge.teacher_dim) == (rank, student_dim, teacher_dim)
    assert bridge.layer_map == MAP
    for layer in (1, 2, 3):
        own, other = (
            bridge.project_student(layer, student[layer - 1]),
            bridge.project_teacher(layer, teacher[layer - 1]),
        )
        assert distance(own, other) < 1e-6
        centred = teacher[layer - 1] - teacher[layer - 1].mean(0)
        assert other.norm().item() == pytest.approx(centred.norm().item(), rel=1e-6)  # all of it, not a part


def test_directions_are_the_pca_up_to_sign():
    student, teacher = planted(6, noise=0.05)
    bridge = fitter_of((student, teacher)).fit(rank="full")
    for layer, rows in enumerate(teacher, 1):
        centred = rows - rows.mean(0)
        _, _, reference = torch.linalg.svd(centred, full_matrices=False)
        expected = centred @ reference[:HIGHEST].T
        found = bridge.project_teacher(layer, rows)
        sign = (found * expected).sum(0).sign()
        assert distance(found, expected * sign) < 1e-5


@pytest.mark.parametrize("intercept", [None, True, False])
@pytest.mark.parametrize("rank", [1, 2, 7, 9])
def test_every_rank_is_a_slice(rank, intercept):
    rows, held_out = split(planted(6, noise=0.1))
    fitter = fitter_of(rows, held_out=held_out)
    one = fitter.fit(rank=rank, intercept=intercept)
    other = fitter.fit(rank="full", intercept=intercept).truncate(rank)
    for layer, (own, opposite) in enumerate(zip(*held_out, strict=True), 1):
        assert one.project_student(layer, own).equal(other.project_student(layer, own))
        assert one.project_teacher(layer, opposite).equal(other.project_teacher(layer, opposite))
    assert one.report == other.report
    assert one.report["rank"]["taken"] == rank


@pytest.mark.parametrize("layers", [1, 3])
def test_each_layer_is_fitted_alone(layers):
    student, teacher = planted(6, noise=0.1)
    together = fitter_of((student, teacher)).fit(rank=5, intercept=True)
    alone = fitter_of((student[layers - 1 :][:1], teacher[layers - 1 :][:1]), layer_map=[1]).fit(rank=5, intercept=True)
    own, other = student[layers - 1], teacher[layers - 1]
    assert together.project_student(layers, own).equal(alone.project_student(1, own))
    assert together.project_teacher(layers, other).equal(alone.project_teacher(1, other))


def assert_same_fit(one, other):
    assert one.count == other.count
    for mine, theirs in zip(*(f.solutions(ridge=1e-8, intercept=True) for f in (one, other)), strict=True):
        for part in ("student_map", "student_mean", "directions", "teacher_mean", "variance"):
            assert distance(getattr(mine, part), getattr(theirs, part)) < 1e-9


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=5), seed=st.integers(0, 99), fitters=st.integers(1, 3))
def test_chunks_order_and_merging_do_not_matter(cuts, seed, fitters):
    (student, teacher), held_out = split(planted(6, n=400, noise=0.1), at=300)
    whole = fitter_of((student, teacher), held_out=held_out)
    student, teacher = (torch.cat(sides, 1) for sides in zip((student, teacher), held_out, strict=True))
    order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    parts = [fitter_of() for _ in range(fitters)]
    for place, (start, end) in enumerate(pairwise([0, *sorted(cuts), 400])):
        for is_held_out in (False, True):
            chosen = [row for row in order[start:end].tolist() if (row >= 300) == is_held_out]
            parts[place % fitters].update(student[:, chosen], teacher[:, chosen], held_out=is_held_out)
    merged = parts.pop()
    for part in parts:
        merged.merge(part)
    assert_same_fit(merged, whole)
    one, other = (fitter.fit(rank=4).report for fitter in (merged, whole))
    assert one["fit"]["rows_held_out"] == other["fit"]["rows_held_out"] == 100
    assert one["rank"] == other["rank"]
    for name in ("before", "after"):
        assert one["cosine"][name] == pytest.approx(other["cosine"][name], abs=1e-5)
    for side in ("train", "held_out"):
        assert one["explained"][side] == pytest.approx(other["explained"][side], rel=1e-7)


def test_merging_leaves_the_other_as_it_was():
    rows, held_out = split(planted(6, noise=0.1))
    other = fitter_of(rows, held_out=held_out)
    one = fitter_of(rows)
    one.merge(other)
    one.update(*rows)
    one.update(*held_out, held_out=True)
    assert (other.count, other.held_out[0].count, len(other.sample)) == (450, 150, 150)
    assert (one.count, one.held_out[0].count, len(one.sample)) == (1350, 300, 300)
    assert_same_fit(other, fitter_of(rows))


def test_lists_and_small_floats_do_as_well():
    student, teacher = planted(6, noise=0.1)
    rounded = student.bfloat16(), teacher.bfloat16()
    assert_same_fit(
        fitter_of(tuple(list(side) for side in rounded)), fitter_of(tuple(side.double() for side in rounded))
    )


def test_memory_does_not_depend_on_rows():
    def numbers(fitter):
        kept = [m for part in (fitter.train, fitter.held_out) for layer in part for m in layer.tensors().values()]
        kept += [fitter.sample.keys, *fitter.sample.student, *fitter.sample.teacher]
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)

    few, many = planted(6, n=1500), planted(6, n=6000)
    assert numbers(fitter_of(few, held_out=few)) == numbers(fitter_of(many, many, held_out=many))


def test_a_fit_leaves_the_sums_as_they_were():
    rows, held_out = split(planted(6, noise=0.1))
    fitter = fitter_of(rows, held_out=held_out)
    first, second = fitter.fit(), fitter.fit()
    assert first.report == second.report
    assert first.project_student(2, rows[0][1]).equal(second.project_student(2, rows[0][1]))


# ------------------------------------------------------------------------------------------------ what is chosen


def test_held_out_rows_take_no_part_in_the_fit():
    rows, held_out = split(planted(6, noise=0.3))
    with_them, without = fitter_of(rows, held_out=held_out), fitter_of(rows)
    assert with_them.count == without.count == 450
    one, other = (fitter.fit(rank=5, intercept=True) for fitter in (with_them, without))
    assert one.project_student(1, rows[0][0]).equal(other.project_student(1, rows[0][0]))
    assert one.report["fit"]["rows_held_out"] == 150
    assert other.report["fit"]["rows_held_out"] == 0
    assert "held_out" not in other.report["explained"]
    assert "cosine" not in other.report


def test_updates_of_no_rows_change_nothing():
    """A batch may have no position on one side; its share must not become a division by zero."""
    states = planted(6, noise=0.1)
    nothing = tuple(side[:, :0] for side in states)
    found, expected = fitter_of(states, nothing, held_out=nothing).fit(), fitter_of(states).fit()
    assert found.report == expected.report
    assert found.rank == expected.rank


def explained_by_hand(bridge, student, teacher):
    """Share of the teacher's variance that full-rank maps explain, mean over layers."""
    shares = []
    for layer, (own, other) in enumerate(zip(student, teacher, strict=True), 1):
        aim = bridge.project_teacher(layer, other)
        error = (bridge.project_student(layer, own) - aim).pow(2).mean(0).sum()
        shares.append(1 - (error / (aim - aim.mean(0)).pow(2).mean(0).sum()).item())
    return sum(shares) / len(shares)


def test_an_intercept_where_means_matter():
    rows, held_out = split(planted(6, noise=0.1))
    rows, held_out = ((student + 3, teacher) for student, teacher in (rows, held_out))
    fitter = fitter_of(rows, held_out=held_out)
    bridge = fitter.fit(rank="full")
    shares = bridge.report["fit"]["variance_explained"]
    assert bridge.report["fit"]["intercept"] is True
    assert shares["with"] > shares["without"] + 0.005
    assert explained_by_hand(bridge, *held_out) > explained_by_hand(fitter.fit("full", intercept=False), *held_out)


def test_no_intercept_where_held_out_rows_speak_against_it():
    """The fitted rows have a mean by accident: the law behind both is linear, and the teacher's mean is another one."""
    student, teacher = planted(6, n=900, noise=0.05)
    student = student - student.mean(1, keepdim=True)
    teacher = teacher - teacher.mean(1, keepdim=True)
    rows = student[:, :600] + 0.3, teacher[:, :600]
    held_out = student[:, 600:], teacher[:, 600:]
    fitter = fitter_of(rows, held_out=held_out)
    bridge = fitter.fit(rank="full")
    shares = bridge.report["fit"]["variance_explained"]
    assert bridge.report["fit"]["intercept"] is False
    assert shares["without"] > shares["with"] + 0.01
    assert explained_by_hand(bridge, *held_out) > explained_by_hand(fitter.fit("full", intercept=True), *held_out)
    unseen = fitter_of(rows).fit(rank="full").report["fit"]  # without held-out rows, training rows decide
    assert unseen["intercept"] is True
    assert unseen["variance_explained"]["with"] > unseen["variance_explained"]["without"]


def test_where_means_are_zero_the_intercept_hardly_matters():
    student, teacher = planted(6, n=4000, noise=0.1)
    states = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    rows, held_out = split(states, at=3000)
    shares = fitter_of(rows, held_out=held_out).fit().report["fit"]["variance_explained"]
    assert shares["with"] == pytest.approx(shares["without"], abs=1e-3)
    assert shares["with"] > 0.5


def test_the_intercept_can_be_asked_for():
    student, teacher = planted(6, noise=0.1)
    fitter = fitter_of((student, teacher))
    linear, affine = (fitter.fit(rank=5, intercept=choice) for choice in (False, True))
    rows, zero = student[0], torch.zeros(1, STUDENT).double()
    assert linear.project_student(1, zero).eq(0).all()
    torch.testing.assert_close(linear.project_student(1, 2 * rows), 2 * linear.project_student(1, rows))
    assert affine.project_student(1, zero).abs().max() > 0.01
    torch.testing.assert_close(affine.project_student(1, rows).mean(0), torch.zeros(5).double(), rtol=0, atol=1e-6)
    assert list(linear.report["fit"]["variance_explained"]) == ["without"]
    assert list(affine.report["fit"]["variance_explained"]) == ["with"]


def test_ridge_shrinks_the_student_and_leaves_the_teacher():
    student, teacher = planted(6, noise=0.1)
    fitter = fitter_of((student, teacher))
    bridges = [fitter.fit(rank=5, ridge=ridge, intercept=True) for ridge in (0.0, 1e-3, 0.1, 10.0)]
    sizes = [bridge.project_student(1, student[0]).norm().item() for bridge in bridges]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]
    assert all(
        bridge.project_teacher(1, teacher[0]).equal(bridges[0].project_teacher(1, teacher[0])) for bridge in bridges
    )
    assert [bridge.report["fit"]["ridge"] for bridge in bridges] == [0.0, 1e-3, 0.1, 10.0]


@pytest.mark.parametrize("ridge", [0.0, 1e-8])
@pytest.mark.parametrize("kind", ["copied", "dead", "few rows"])
def test_rank_deficient_students(kind, ridge):
    """What the states span decides; the rest of the space must not."""
    rows, held_out = split(planted(6, noise=0.05))
    plain = fitter_of(rows, held_out=held_out).fit(rank=4, ridge=ridge, intercept=True)

    def change(states):
        student, teacher = states
        if kind == "copied":
            student = torch.cat([student, student[..., :3]], -1)
        elif kind == "dead":
            student = torch.cat([student, torch.full_like(student[..., :3], 2.0)], -1)
        else:
            student, teacher = student[:, :5], teacher[:, :5]
        return student, teacher

    rows, held_out = change(rows), change(held_out)
    bridge = fitter_of(rows, held_out=held_out, student_dim=rows[0].shape[-1]).fit(rank=4, ridge=ridge, intercept=True)
    for layer in (1, 2, 3):
        found = bridge.project_student(layer, held_out[0][layer - 1])
        assert bool(torch.isfinite(found).all())
        if kind == "few rows":
            assert (
                distance(
                    bridge.project_student(layer, rows[0][layer - 1]), bridge.project_teacher(layer, rows[1][layer - 1])
                )
                < 1e-3
            )
        else:
            assert distance(found, plain.project_student(layer, held_out[0][layer - 1][:, :STUDENT])) < 1e-5


def test_auto_is_the_theorem_on_held_out_rows():
    """Three directions follow the student, the rest are noise of their own with as much variance as the third."""
    n = 2000
    student = normal(1, n, 8, seed=1)
    signal = student[..., :3] * torch.tensor([4.0, 3.0, 2.0]).double()
    teacher = torch.cat([signal, normal(1, n, 5, seed=2) * torch.linspace(1.5, 1, 5).double()], -1) + 1
    rows, held_out = split((student, teacher), at=1500)
    fitter = fitter_of(rows, held_out=held_out, student_dim=8, teacher_dim=8, layer_map=[1])
    bridge = fitter.fit()
    assert bridge.rank == 3
    rank = bridge.report["rank"]
    assert (rank["taken"], rank["by"], rank["theorem"]) == (3, "theorem", 3)
    solutions = fitter.solutions(ridge=1e-8, intercept=bridge.report["fit"]["intercept"])
    assert theorem_rank([s.variance for s in solutions], [solutions[0].r_squared(fitter.held_out[0])], 8) == 3
    curve = cosine_by_rank(solutions, fitter.sample, 8)
    assert rank["held_out_cosine"] == max(curve, key=curve.get)
    asked = fitter.fit(rank=6).report["rank"]
    assert asked == {**rank, "taken": 6, "by": "request"}
    full = fitter.fit(rank="full")
    assert (full.rank, full.report["rank"]["by"]) == (8, "request")


def test_auto_without_held_out_rows_takes_the_theorem_on_fitted_rows():
    student, teacher = planted(4, noise=0.001)
    fitter = fitter_of((student, teacher))
    bridge = fitter.fit()
    solutions = fitter.solutions(ridge=1e-8, intercept=True)
    r_squared = [s.r_squared(m) for s, m in zip(solutions, fitter.train, strict=True)]
    assert bridge.rank == theorem_rank([s.variance for s in solutions], r_squared, HIGHEST) == 4
    assert "held_out_cosine" not in bridge.report["rank"]


@pytest.mark.parametrize(("student_dim", "teacher_dim"), [(10, 14), (14, 10)])
def test_full_is_the_narrower_width(student_dim, teacher_dim):
    states = planted(4, student_dim=student_dim, teacher_dim=teacher_dim, noise=0.1)
    assert fitter_of(states, student_dim=student_dim, teacher_dim=teacher_dim).fit(rank="full").rank == 10


def test_facts_go_into_the_report():
    bridge = fitter_of(planted(4)).fit(rank=2, facts={"data": {"prompts": 7}})
    assert bridge.report["data"] == {"prompts": 7}
    assert bridge.report["fit"]["rows"] == 600


# ------------------------------------------------------------------------------------------------ what is refused


def zeros(layers=3, n=4, width=STUDENT):
    return torch.zeros(layers, n, width)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (zeros(layers=2), zeros(width=TEACHER), "student has 2 layers, the layer map 3"),
        (zeros(), zeros(layers=5, width=TEACHER), "teacher has 5 layers, the layer map 3"),
        (zeros(width=9), zeros(width=TEACHER), r"student, layer 1: expected \[n, 10\], got \[4, 9\]"),
        (zeros(), zeros(), r"teacher, layer 1: expected \[n, 14\], got \[4, 10\]"),
        (
            zeros(),
            [*zeros(2, width=TEACHER), torch.zeros(TEACHER)],
            r"teacher, layer 3: expected \[n, 14\], got \[14\]",
        ),
        (zeros(n=5), zeros(width=TEACHER), "different numbers of rows"),
        (zeros(), zeros(width=TEACHER).index_fill(0, torch.tensor(1), math.nan), "teacher, layer 2: .*NaN or infinity"),
        (
            zeros().index_fill(0, torch.tensor(2), -math.inf),
            zeros(width=TEACHER),
            "student, layer 3: .*NaN or infinity",
        ),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_states_that_are_refused(student, teacher, message, held_out):
    fitter = fitter_of(planted(4))
    with pytest.raises(ValueError, match=message):
        fitter.update(student, teacher, held_out=held_out)
    assert_same_fit(fitter, fitter_of(planted(4)))  # nothing of the refused rows is in the sums
    assert fitter.held_out is None


@pytest.mark.parametrize("held_out", [False, True])
def test_layers_of_unequal_length_are_refused(held_out):
    """A row is one position at every layer; layers that disagree about their number are not of one batch."""
    student, teacher = planted(4, n=8)
    fitter = fitter_of((student, teacher))
    with pytest.raises(ValueError, match="rows"):
        fitter.update(*([*side[:2], side[2, :6]] for side in (student, teacher)), held_out=held_out)
    assert [moments.count for moments in fitter.train] == [8, 8, 8]


@pytest.mark.parametrize("rank", [0, -1, 11, 2.0, "5", "best", True, None])
def test_ranks_that_are_refused(rank):
    with pytest.raises(ValueError, match=r"rank must be auto, full or 1\.\.10, got"):
        fitter_of(planted(4)).fit(rank=rank)


@pytest.mark.parametrize("ridge", [-1e-8, math.nan])
def test_ridges_that_are_refused(ridge):
    with pytest.raises(ValueError, match="ridge must be a number that is not negative"):
        fitter_of(planted(4)).fit(ridge=ridge)


@pytest.mark.parametrize("fitter", [fitter_of(), fitter_of(held_out=planted(4))], ids=["empty", "held out only"])
def test_no_rows(fitter):
    with pytest.raises(ValueError, match="seen no rows"):
        fitter.fit()


@pytest.mark.parametrize("other", [([1, 2, 4], STUDENT, TEACHER), (MAP, STUDENT + 1, TEACHER), (MAP, TEACHER, STUDENT)])
def test_fitters_that_cannot_be_merged(other):
    with pytest.raises(ValueError, match="same layer map and widths"):
        fitter_of().merge(BridgeFitter(*other))
