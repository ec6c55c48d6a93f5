"""Changes of states: the plain form against loops, the streaming one against plain autograd, and what leaves them alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.objectives import (
    TRANSITION_OVER,
    Since,
    position_weights,
    previous_positions,
    representation_loss,
    streaming,
    transition_distance,
    transition_term,
    with_previous,
)
from oprd.states.views import Reading

LAYERS, BATCH, TIME, D, R = 3, 4, 8, 5, 3
OVER = TRANSITION_OVER[:2]


@pytest.fixture
def states():
    student, teacher = torch.randn(2, LAYERS, BATCH, TIME, D, dtype=torch.float64)
    return student.requires_grad_(), teacher


# ------------------------------------------------------------------------------------------------ the plain form


def angle(student_d, teacher_d):
    return 1 - (student_d @ teacher_d) / (student_d.norm() * teacher_d.norm())


def naive(student, teacher, mask, over, reduction, weights):
    """Loops over rows and changes, straight from the definition."""
    if over == "both":
        return sum(naive(student, teacher, mask, o, reduction, weights) for o in OVER) / 2
    rows, pooled = [], []
    for b in range(BATCH):
        where = [t for t in range(TIME) if mask[b, t]]
        changes = []
        if over == "positions":
            for since, to in pairwise(where):
                terms = [angle(*(x[k, b, to] - x[k, b, since] for x in (student, teacher))) for k in range(LAYERS)]
                changes.append(sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights))
        else:
            for t in where:
                terms = [angle(*(x[k, b, t] - x[k - 1, b, t] for x in (student, teacher))) for k in range(1, LAYERS)]
                changes.append(sum(w * term for w, term in zip(weights[1:], terms, strict=True)) / sum(weights[1:]))
        if changes:
            rows.append(sum(changes) / len(changes))
            pooled += changes
    return sum(rows) / len(rows) if reduction == "sequence" else sum(pooled) / len(pooled)


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]], ids=str)
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("over", TRANSITION_OVER)
def test_equals_the_loops_with_gradients(states, mask_BT, over, reduction, weights):
    student, teacher = states
    mask_BT[3, 4] = True  # a row with one position
    options = {"kind": "transition", "transition_over": over, "reduction": reduction, "layer_weights": weights}
    fast = representation_loss(student, teacher, mask_BT, **options)
    slow = naive(student, teacher, mask_BT, over, reduction, weights or [1.0] * LAYERS)
    torch.testing.assert_close(fast, slow, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (fast, slow)), atol=1e-7, rtol=1e-6)
    if over == "positions":
        options.pop("transition_over")
        torch.testing.assert_close(representation_loss(student, teacher, mask_BT, **options), fast)


def value_and_gradient(student, teacher, mask, **options):
    student = student.detach().requires_grad_()
    loss = representation_loss(student, teacher, mask, **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), over=st.sampled_from(OVER), side=st.sampled_from(["student", "teacher"]))
def test_a_constant_and_a_scale_change_nothing(seed, over, side):
    """A vector added to all of a model's states (of a layer; over layers, of the model), or a factor to all of them."""
    generator = torch.Generator().manual_seed(seed)
    both = {s: torch.randn(LAYERS, BATCH, TIME, D, generator=generator).double() for s in ("student", "teacher")}
    offsets = torch.randn(1 if over == "layers" else LAYERS, 1, 1, D, generator=generator).double()
    mask = torch.rand(BATCH, TIME, generator=generator) < 0.7
    mask[0, :2] = True
    options = {"kind": "transition", "transition_over": over}
    loss, gradient = value_and_gradient(**both, mask=mask, **options)
    moved = both | {side: both[side] + offsets}
    torch.testing.assert_close(value_and_gradient(**moved, mask=mask, **options), (loss, gradient))
    scaled = both | {side: both[side] * 8}
    expected = gradient / 8 if side == "student" else gradient
    torch.testing.assert_close(value_and_gradient(**scaled, mask=mask, **options), (loss, expected))
    points = [representation_loss(**x, mask=mask, kind="mse") for x in (both, moved, scaled)]
    assert abs(points[1] / points[0] - 1) > 1e-6
    assert abs(points[2] / points[0] - 1) > 1e-6


def test_no_change_has_no_direction_and_no_gradient():
    change = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [1e-30, 0.0]], requires_grad=True)
    other = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    distance = transition_distance(change, other)
    assert distance.tolist() == [1, 1, 1, 1]  # the last one's square is below what float32 holds
    (gradient,) = torch.autograd.grad(distance.sum(), change)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("over", TRANSITION_OVER)
@pytest.mark.parametrize("kept", [[], [(0, 3), (2, 1)]], ids=["nothing supervised", "single positions"])
def test_without_changes_it_is_zero_with_a_live_graph(states, over, kept):
    student, teacher = states
    mask = torch.zeros(BATCH, TIME, dtype=torch.bool)
    for at in kept:
        mask[at] = True
    loss = representation_loss(student, teacher, mask, kind="transition", transition_over=over)
    assert (loss.item() == 0) == (over == "positions" or not kept)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()


def test_wrong_and_ignored_settings(states, mask_BT):
    student, teacher = states
    with pytest.raises(ValueError, match="positions, layers, both"):
        representation_loss(student, teacher, mask_BT, kind="transition", transition_over="time")
    with pytest.raises(ValueError, match="leave it out"):
        representation_loss(student, teacher, mask_BT, kind="mse", transition_over="positions")
    with pytest.raises(ValueError, match="two compared layers"):
        representation_loss(student[:1], teacher[:1], mask_BT, kind="transition", transition_over="layers")
    with pytest.raises(ValueError, match="a weight above 0"):
        representation_loss(
            *(student, teacher, mask_BT), kind="transition", transition_over="both", layer_weights=[1, 0, 0]
        )


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=6))
def test_previous_positions(lengths):
    rows = [row for row, length in enumerate(lengths) for _ in range(length)]
    expected = [n - 1 if n and rows[n - 1] == rows[n] else -1 for n in range(len(rows))]
    assert previous_positions(torch.tensor(rows, dtype=torch.long)).tolist() == expected
    mask = torch.tensor([[t < length for t in range(4)] for length in lengths], dtype=torch.bool).reshape(-1, 4)
    assert with_previous(mask).sum(1).tolist() == [max(length - 1, 0) for length in lengths]
    assert previous_positions(mask.nonzero()[:, 0]).ge(0).equal(with_previous(mask)[mask])


def test_documents_of_a_packed_reading_are_rows_of_the_padded_one():
    """So changes do not cross documents; places in them too, also where a document starts late."""
    ids = torch.zeros(3, 4, dtype=torch.long)
    padded = Reading(ids, ids.bool())
    place_N = torch.tensor([1, 2, 4, 5, 6, 11])
    assert padded.document_of(place_N).tolist() == [0, 0, 1, 1, 1, 2]
    assert padded.position_of(place_N).tolist() == [1, 2, 0, 1, 2, 3]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 2, 3]])
    packed = Reading(ids[:1], ids[:1].bool(), positions, (3, 3, 0, 2))
    place_N = torch.tensor([1, 2, 3, 4, 5, 7])
    assert packed.document_of(place_N).tolist() == [0, 0, 1, 1, 1, 3]
    assert packed.position_of(place_N).tolist() == [1, 2, 0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ the streaming form


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"slices of {rows}")
def sliced(request, monkeypatch):
    monkeypatch.setattr(streaming, "SLICE_BYTES", 4 * D * request.param)


def over_positions(student_LMd, teacher_LMd, place_N, row_N, weights_N, layer, **options):
    """As a trainer calls it: views of what is there, weights 0 across rows."""
    target_Nd = teacher_LMd[layer][place_N]
    since = Since(student_LMd[layer], place_N[:-1], target_Nd[:-1])
    return transition_term(student_LMd[layer], place_N[1:], target_Nd[1:], weights_N[1:], since, **options)


@pytest.mark.parametrize("over", OVER)
def test_streaming_equals_the_plain_form(sliced, states, mask_BT, over):
    """Layer by layer with global weights, in float64, gradients to every layer's states."""
    student, teacher = states
    weights_N = position_weights(with_previous(mask_BT) if over == "positions" else mask_BT)[mask_BT].double()
    place_N, row_N = mask_BT.flatten().nonzero().squeeze(1), mask_BT.nonzero()[:, 0]
    assert weights_N.gt(0).equal(previous_positions(row_N) >= 0) or over == "layers"
    own, other = list(student.flatten(1, 2)), list(teacher.flatten(1, 2))  # each layer one tensor, as in a forward
    terms = []
    for layer in range(LAYERS):
        if over == "positions":
            terms.append(over_positions(own, other, place_N, row_N, weights_N, layer))
        elif layer:
            since = Since(own[layer - 1], place_N, other[layer - 1][place_N])
            terms.append(transition_term(own[layer], place_N, other[layer][place_N], weights_N, since))
    fast = torch.stack([term.loss for term in terms]).mean()
    slow = representation_loss(student, teacher, mask_BT, kind="transition", transition_over=over)
    torch.testing.assert_close(fast, slow, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (fast, slow)), atol=1e-7, rtol=1e-6)


def setting(n=7, m=19, states=torch.float32, targets=torch.float32, projected=False, same=True):
    """Changes among the places of one tensor, or from one to another's, in no order; some places have both roles."""
    states_Md = torch.randn(m, D).to(states).requires_grad_()
    other_Md = states_Md if same else torch.randn(m + 2, D).to(states).requires_grad_()
    width = R if projected else D
    maps = [(lambda x, w=w: x.to(w) @ w.T) if projected else None for w in torch.randn(2, R, D)]
    target_Nr, other_target_Nr = torch.randn(2, n, width).to(targets)
    since = Since(other_Md, torch.randperm(m)[:n], other_target_Nr, maps[1])
    return states_Md, torch.randperm(m)[:n], target_Nr, torch.rand(n), since, maps[0]


def plain(states_Md, place_N, target_Nr, weights_N, since, project=None):
    """Gathered and compared by autograd."""
    own, other = states_Md[place_N], since.states_Md[since.place_N]
    own, other = (x if p is None else p(x) for x, p in ((own, project), (other, since.project or project)))
    own_Nr = own.float() - other.float()
    target = target_Nr.float() - since.target_Nr.float()
    distance_N = 1 - torch.nn.functional.cosine_similarity(own_Nr, target)
    own_sums = (1 - distance_N).sum(), distance_N.sum(), target.pow(2).mean(1).sum()
    return (weights_N * distance_N).sum(), *(x.detach() for x in own_sums)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("projected", [False, True])
def test_streaming_equals_plain_autograd(sliced, projected, same):
    given_ = setting(projected=projected, same=same)
    ours, twin = transition_term(*given_), plain(*given_)
    torch.testing.assert_close(tuple(ours), twin)
    inputs = [given_[0]] if same else [given_[0], given_[4].states_Md]
    gradients = [torch.autograd.grad(3 * x[0], inputs) for x in (ours, twin)]
    torch.testing.assert_close(*gradients)
    assert all(g.abs().max() > 0 for g in gradients[0])


@pytest.mark.parametrize("scale", [1.0, 2.0**12], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_subtracted_in_float32(sliced, dtype, scale):
    given_ = setting(states=dtype, targets=dtype)
    ours, twin = transition_term(*given_), plain(*given_)
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close(tuple(ours), twin)
    gradients = [torch.autograd.grad(scale * x[0], given_[0])[0] for x in (ours, twin)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("same", [True, False])
def test_gradcheck(monkeypatch, same):
    monkeypatch.setattr(streaming, "SLICE_BYTES", 4 * D * 3)
    states_Md, place_N, target_Nr, weights_N, since, _ = setting(states=torch.float64, targets=torch.float64, same=same)

    def loss(own, other):
        return transition_term(
            own, place_N, target_Nr, weights_N.double(), Since(other, since.place_N, since.target_Nr)
        ).loss

    assert torch.autograd.gradcheck(loss, (states_Md, since.states_Md))


@pytest.mark.parametrize("frozen", ["own", "other"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    states_Md, place_N, target_Nr, weights_N, since, _ = setting(same=False)
    (states_Md if frozen == "own" else since.states_Md).requires_grad_(False)
    kept = since.states_Md if frozen == "own" else states_Md
    given_ = (states_Md, place_N, target_Nr, weights_N, since)
    gradients = [torch.autograd.grad(f(*given_)[0], kept)[0] for f in (transition_term, plain)]
    torch.testing.assert_close(*gradients)


def test_no_change_at_all_is_finite_and_stays(sliced):
    """A place counted from itself, a target without change, and both."""
    states_Md, place_N, target_Nr, weights_N, since, _ = setting()
    since.place_N[:2] = place_N[:2]
    since.target_Nr[1:3] = target_Nr[1:3]
    term = transition_term(states_Md, place_N, target_Nr, weights_N, since)
    (gradient,) = torch.autograd.grad(term.loss, states_Md)
    assert gradient.isfinite().all()
    rest = Since(states_Md, since.place_N[3:], since.target_Nr[3:])
    others = transition_term(states_Md, place_N[3:], target_Nr[3:], weights_N[3:], rest)
    torch.testing.assert_close(term.loss, others.loss + weights_N[:3].sum())
    torch.testing.assert_close(gradient, torch.autograd.grad(others.loss, states_Md)[0])


def test_what_weighs_nothing_is_not_counted():
    states_Md, place_N, target_Nr, weights_N, since, _ = setting()
    weights_N[::2] = 0
    term = transition_term(states_Md, place_N, target_Nr, weights_N, since)
    kept = slice(1, None, 2)
    rest = Since(states_Md, since.place_N[kept], since.target_Nr[kept])
    fewer = transition_term(states_Md, place_N[kept], target_Nr[kept], weights_N[kept], rest)
    torch.testing.assert_close(tuple(term), tuple(fewer))


@pytest.mark.parametrize("same", [True, False])
def test_without_changes_streaming_is_zero_with_a_live_graph(same):
    given_ = setting(0, same=same)
    term = transition_term(*given_)
    assert [x.item() for x in term] == [0, 0, 0, 0]
    gradients = torch.autograd.grad(term.loss, [given_[0]] if same else [given_[0], given_[4].states_Md])
    assert all(g.eq(0).all() for g in gradients)


def test_nothing_of_the_size_of_the_changes_is_kept():
    given_ = setting()
    states_Md, place_N, target_Nr, weights_N, since, _ = given_
    inputs = {x.data_ptr() for x in (states_Md, place_N, target_Nr, weights_N, since.place_N, since.target_Nr)}

    def kept_by(function):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (kept.update({x.untyped_storage().data_ptr(): x.numel()}), x)[1], lambda x: x
        ):
            result = function(*given_)
        return {place: size for place, size in kept.items() if place not in inputs}, result

    ours, alive = kept_by(transition_term)
    theirs, also_alive = kept_by(plain)
    assert ours == {}
    assert max(theirs.values()) >= target_Nr.numel()
    assert alive[0].grad_fn is not None
    assert also_alive[0].grad_fn is not None


def test_as_many_to_count_from_as_change():
    states_Md, place_N, target_Nr, weights_N, since, _ = setting()
    with pytest.raises(ValueError, match="7 places change, and 6 places and 7 targets"):
        transition_term(states_Md, place_N, target_Nr, weights_N, Since(states_Md, place_N[1:], since.target_Nr))
