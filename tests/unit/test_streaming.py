"""`state_term` against plain autograd on gathered states: value, gradient, and what it keeps until backward."""

import pytest
import torch

from oprd.objectives import REPRESENTATION_KINDS, cosine_similarity, representation_distance, state_term, streaming

M, N, D, R = 23, 11, 6, 4


def setting(n=N, *, states=torch.float32, targets=torch.float32, projected=False):
    """States of all places, the supervised ones in no order, targets and weights; a frozen map and offset."""
    width = R if projected else D
    states_Md = (torch.randn(M, D) + 1).to(states).requires_grad_()
    place_N = torch.randperm(M)[:n]
    target_Nr, weights_N = torch.randn(n, width).to(targets), torch.rand(n)
    frozen_rd, mean_d = torch.randn(R, D), torch.randn(D)
    project = (lambda x: (x.to(mean_d) - mean_d) @ frozen_rd.T) if projected else None
    return states_Md, place_N, target_Nr, weights_N, project


def plain(states_Md, place_N, target_Nr, weights_N, kind, project):
    own_Nr = states_Md[place_N] if project is None else project(states_Md[place_N])
    distance_N = representation_distance(own_Nr, target_Nr, kind)
    cosine, power = cosine_similarity(own_Nr, target_Nr).sum(), target_Nr.float().pow(2).mean(1).sum()
    return (weights_N * distance_N).sum(), cosine, distance_N.detach().float().sum(), power


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"slices of {rows}")
def sliced(request, monkeypatch):
    monkeypatch.setattr(streaming, "SLICE_BYTES", 4 * D * request.param)


@pytest.mark.parametrize("targets", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", REPRESENTATION_KINDS)
def test_equals_plain_autograd(sliced, kind, projected, targets):
    *given, project = setting(targets=targets, projected=projected)
    term, *sums = state_term(*given, kind, project)
    slow, *slow_sums = plain(*given, kind, project)
    torch.testing.assert_close(term, slow)
    torch.testing.assert_close(sums, slow_sums)
    assert not any(x.requires_grad for x in sums)
    ours, twin = (torch.autograd.grad(3 * x, given[0])[0] for x in (term, slow))
    torch.testing.assert_close(ours, twin)
    assert ours.abs().max() > 0
    untouched = torch.ones(M, dtype=torch.bool).index_fill(0, given[1], False)
    assert ours[untouched].eq(0).all()


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 2.0**16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_get_the_gradient_that_autograd_rounds_once(sliced, dtype, scale):
    """The factor of the loss comes before the rounding: a loss scale must lift a gradient over float16's floor."""
    states_Md, place_N, target_Nr, weights_N, _ = setting(states=dtype, targets=dtype)
    weights_N = weights_N * 1e-8
    term, *_ = state_term(states_Md, place_N, target_Nr, weights_N)
    slow, *_ = plain(states_Md, place_N, target_Nr, weights_N, "mse", None)
    assert term.dtype == torch.float32
    torch.testing.assert_close(term, slow)
    ours, twin = (torch.autograd.grad(scale * x, states_Md)[0] for x in (term, slow))
    assert ours.dtype == dtype
    assert ours.equal(twin)
    if scale > 1:
        assert ours[place_N].ne(0).any(1).all()


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", REPRESENTATION_KINDS)
def test_without_positions_it_is_zero_with_a_live_graph(kind, projected):
    *given, project = setting(0, projected=projected)
    term, *sums = state_term(*given, kind, project)
    assert [x.item() for x in (term, *sums)] == [0, 0, 0, 0]
    (gradient,) = torch.autograd.grad(term, given[0])
    assert gradient.eq(0).all()


def test_nothing_of_the_size_of_the_targets_is_kept():
    """What the graph holds are the very tensors that went in; plain autograd keeps the gathered states and more."""
    states_Md, place_N, target_Nr, weights_N, _ = setting()
    inputs = {x.data_ptr() for x in (states_Md, place_N, target_Nr, weights_N)}

    def kept_by(function):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (kept.update({x.untyped_storage().data_ptr(): x.numel()}), x)[1], lambda x: x
        ):
            result = function(states_Md, place_N, target_Nr, weights_N, "mse", None)
        return {place: size for place, size in kept.items() if place not in inputs}, result

    ours, alive = kept_by(state_term)
    assert ours == {}
    theirs, also_alive = kept_by(plain)
    assert max(theirs.values()) >= N * D
    assert alive[0].grad_fn is not None
    assert also_alive[0].grad_fn is not None


def test_a_backward_under_autocast_is_as_exact_as_the_forward():
    *given, project = setting(projected=True)
    term, *_ = state_term(*given, "mse", project)
    slow, *_ = plain(*given, "mse", project)
    with torch.autocast("cpu", torch.bfloat16):
        (ours,) = torch.autograd.grad(term, given[0], retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(slow, given[0])[0])


def test_a_term_that_is_not_used_costs_no_backward():
    *given, _ = setting()
    states_Md = given[0]
    term, *sums = state_term(*given)
    (gradient,) = torch.autograd.grad(states_Md.sum() + 0 * sum(sums) + 0 * term.detach(), states_Md)
    assert gradient.eq(1).all()
