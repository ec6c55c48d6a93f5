"""The sums of a diagnosis against slow, obvious twins."""

import math

import pytest
import torch
import torch.nn.functional as F

from oprd.insight.choices import ChoiceSums
from oprd.insight.comparison import by_chance
from oprd.insight.diagnostics import OUTLIERS, ActivationSums, ByPosition, KernelAlignment, StateSums, u_centred
from oprd.models import Head


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic(k, el):
    """The unbiased estimate, term by term (Song et al. 2012, Eq. 5)."""
    n = len(k)
    k, el = (m - torch.diag(m.diagonal()) for m in (k, el))
    one = torch.ones(n, dtype=torch.float64)
    total = (k @ el).trace() + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * one @ k @ el @ one) / (n * (n - 3))


def test_u_centred_kernels_give_the_unbiased_hsic():
    a, b = rows(9, 4), rows(9, 6, seed=1) + 2
    k, el = a @ a.T, b @ b.T
    inner = (u_centred(k) * u_centred(el)).sum() / (9 * 6)
    assert inner == pytest.approx(float(hsic(k, el)), rel=1e-9)


def test_kernel_alignment_is_cka_of_every_pair_of_layers():
    own, other = [rows(12, 5), rows(12, 5, seed=1)], [rows(12, 3, seed=2), rows(12, 3, seed=3), rows(12, 3, seed=4)]
    sums = KernelAlignment(2, 3)
    sums.update(own, other)
    for i, a in enumerate(own):
        for j, b in enumerate(other):
            k, el = a @ a.T, b @ b.T
            expected = hsic(k, el) / (hsic(k, k) * hsic(el, el)).sqrt()
            assert float(sums.matrix()[i, j]) == pytest.approx(float(expected), rel=1e-9)


def test_kernel_alignment_sees_through_a_rotation_and_not_through_noise():
    a = rows(64, 8)
    rotation = torch.linalg.qr(rows(8, 8, seed=1)).Q
    same, chance = KernelAlignment(1, 1), KernelAlignment(1, 1)
    for part in a.split(32):
        same.update([part], [3 * part @ rotation + 5])
        chance.update([part], [rows(32, 200, seed=int(part[0, 0] * 1e6) % 1000)])
    assert float(same.matrix()) == pytest.approx(1, abs=1e-9)
    assert abs(float(chance.matrix())) < 0.3  # the plain estimate is above 0.6 for 32 rows in 200 dimensions


def test_by_position_counts_the_first_and_the_last_k():
    lengths = (1, 2, 5, 9)
    values = [rows(2, n, seed=n) for n in lengths]
    sums = ByPosition(2)
    before = torch.cat([torch.arange(n) for n in lengths])
    after = torch.cat([torch.arange(n).flip(0) for n in lengths])
    for part in (slice(0, 6), slice(6, None)):
        sums.update(torch.cat(values, 1)[:, part], before[part], after[part])
    curves = sums.curves()
    assert [row["k"] for row in curves] == [1, 2, 4, 8, 16]
    for row in curves:
        first = torch.cat([v[:, : row["k"]] for v in values], 1).mean(1)
        last = torch.cat([v[:, -row["k"] :] for v in values], 1).mean(1)
        assert row["first"] == pytest.approx(first.tolist()) and row["last"] == pytest.approx(last.tolist())


def test_state_sums_are_those_of_all_rows_at_once():
    own, other = rows(40, 10).float(), rows(40, 10, seed=1).float() + 0.5
    other[:, 3] += 50  # one dimension that fakes a cosine
    own[:, 3] += 50
    sums = StateSums(10)
    pieces = [
        sums.update(own[part], other[part], torch.arange(len(own[part])).flip(0))
        for part in (slice(0, 15), slice(15, 40))
    ]
    found = sums.result()
    cosine = F.cosine_similarity(own, other, dim=-1)
    assert torch.allclose(torch.cat(pieces), cosine)
    assert found["cosine"] == pytest.approx(float(cosine.mean()), abs=1e-6) and found["cosine"] > 0.98
    assert found["distance"] == pytest.approx(float((own - other).square().mean()), rel=1e-5)
    assert sums.count == 40
    kept = [d for d in range(10) if d not in _largest(own, other)]
    assert 3 not in kept and len(kept) == 10 - OUTLIERS
    gap, around = (own - other)[:, kept], other[:, kept] - other[:, kept].mean(0)
    assert found["explained"] == pytest.approx(float(1 - gap.square().sum() / around.square().sum()), rel=1e-4)
    assert found["cosine_trimmed"] < 0.5  # what is left of it without that dimension


def _largest(own, other):
    share = sum(x.double().square().sum(0) / x.double().square().sum() for x in (own, other))
    return share.topk(OUTLIERS).indices.tolist()


def test_states_that_are_the_teachers_explain_all_and_a_constant_nothing():
    other = rows(50, 8).float()
    same, constant, unrelated = StateSums(8), StateSums(8), StateSums(8)
    order = torch.randperm(50)
    same.update(other, other, order)
    constant.update(other.mean(0).expand(50, 8), other, order)
    unrelated.update(rows(50, 8, seed=5).float(), other, order)
    assert same.result()["explained"] == pytest.approx(1)
    assert constant.result()["explained"] == pytest.approx(0, abs=1e-6)
    assert unrelated.result()["explained"] < -0.5
    assert abs(same.result()["cosine_shuffled"]) < 0.3


@pytest.mark.parametrize(
    ("peak", "massive"), [(3000.0, True), (300.0, False), (50.0, False)], ids=["massive", "large", "small"]
)
def test_massive_activations_are_large_and_a_thousand_times_the_median(peak, massive):
    states = rows(100, 16).float()
    states[7, 5] = peak
    sums = ActivationSums(16)
    for part in states.split(30):
        sums.update(part)
    found = sums.result()
    assert found["massive"] is massive and found["peak"] == peak
    assert found["rms"] == pytest.approx(float(states.square().mean().sqrt()), rel=1e-5)
    square = states.double().square().sum(0)
    assert found["outliers"][0] == 5
    assert found["outlier_share"] == pytest.approx(float(square.topk(4).values.sum() / square.sum()), rel=1e-6)


def head(vocab, width, seed):
    return Head(rows(vocab, width, seed=seed).float(), None, 1.0, None)


def test_choices_under_both_heads_are_those_of_whole_distributions():
    own_head, other_head = head(23, 6, 1), head(23, 6, 2)
    own, other = rows(31, 6, seed=3).float(), rows(31, 6, seed=4).float()
    sums = ChoiceSums(own_head, other_head, one_vocabulary=True, one_width=True, agree=lambda a, b: a == b)
    kl = torch.cat([sums.update(own[part], other[part]) for part in (slice(0, 10), slice(10, 31))])
    found = sums.result()

    def naive_kl(logits, reference):
        p, q = logits.double().softmax(-1), reference.double().softmax(-1)
        return (p * (p / q).log()).sum(-1)

    student, teacher = own @ own_head.weight_Vd.T, other @ other_head.weight_Vd.T
    assert torch.allclose(kl.double(), naive_kl(student, teacher), atol=1e-5)
    assert found["kl"] == pytest.approx(float(naive_kl(student, teacher).mean()), rel=1e-4)
    chosen = teacher.argmax(-1)
    assert found["agreement"] == pytest.approx(float((student.argmax(-1) == chosen).float().mean()))
    p = student.double().softmax(-1)
    assert found["entropy_student"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    sets = [
        {*a.tolist()} & {*b.tolist()} for a, b in zip(student.topk(16).indices, teacher.topk(16).indices, strict=True)
    ]
    assert found["top16_overlap"] == pytest.approx(sum(map(len, sets)) / 16 / 31)
    swapped = other @ own_head.weight_Vd.T
    assert found["teacher_under_student_head/kl"] == pytest.approx(float(naive_kl(swapped, teacher).mean()), rel=1e-4)
    lent = own @ other_head.weight_Vd.T
    assert found["student_under_teacher_head/agreement"] == pytest.approx(
        float((lent.argmax(-1) == chosen).float().mean())
    )


def test_choices_of_two_vocabularies_are_compared_by_agreement_alone():
    sums = ChoiceSums(
        head(23, 6, 1), head(11, 6, 2), one_vocabulary=False, one_width=True, agree=lambda a, b: a % 11 == b
    )
    assert sums.update(rows(5, 6).float(), rows(5, 6, seed=1).float()) is None
    assert set(sums.result()) == {"entropy_student", "entropy_teacher", "agreement"}
    assert sums.result()["entropy_teacher"] < math.log(11)


@pytest.mark.parametrize("count", [0, 2, 3, 16])
def test_pairs_by_chance_are_never_the_true_ones(count):
    for seed in range(20):
        order = by_chance(count, torch.Generator().manual_seed(seed))
        assert sorted(order.tolist()) == list(range(count))
        assert not (order == torch.arange(count)).any()
