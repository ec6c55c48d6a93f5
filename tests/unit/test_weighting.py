"""Layer weights and running means against plain loops; positions that count more, and the gradient of that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.objectives import (
    LAYER_WEIGHTINGS,
    RunningMean,
    Since,
    layer_weights,
    representation_distance,
    state_term,
    streaming,
    transition_term,
)

amounts = st.floats(1e-3, 1e3)


def naive(kind, distances, powers):
    raw = [
        {"uniform": 1.0, "teacher_rms": 1 / p, "adaptive": d / p}[kind] for d, p in zip(distances, powers, strict=True)
    ]
    mean = sum(raw) / len(raw)
    if kind == "adaptive":
        raw = [min(max(w, mean / 4), 4 * mean) for w in raw]
    return [w * len(raw) / sum(raw) for w in raw]


@settings(deadline=None)  # torch's first call takes its time
@given(st.sampled_from(LAYER_WEIGHTINGS), st.lists(st.tuples(amounts, amounts), min_size=1, max_size=6))
def test_layer_weights_equal_the_loop(kind, layers):
    distance_L, power_L = torch.tensor(layers, dtype=torch.float64).T
    weights_L = layer_weights(kind, distance_L, power_L)
    torch.testing.assert_close(weights_L, torch.tensor(naive(kind, *zip(*layers, strict=True)), dtype=torch.float64))
    assert abs(weights_L.mean() - 1) < 1e-9


def test_teacher_rms_makes_errors_relative():
    """Scaling a layer of both models by c scales its mse by c^2, and leaves what it adds to the loss in proportion."""
    distance_L, power_L, scale_L = torch.rand(3) + 0.1, torch.rand(3) + 0.1, torch.tensor([1.0, 9.0, 100.0])
    before = layer_weights("teacher_rms", distance_L, power_L) * distance_L
    after = layer_weights("teacher_rms", distance_L * scale_L, power_L * scale_L) * distance_L * scale_L
    torch.testing.assert_close(after / after.sum(), before / before.sum())


@pytest.mark.parametrize("kind", LAYER_WEIGHTINGS)
def test_what_has_no_estimate_weighs_one(kind):
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert layer_weights(kind, zeros, zeros).equal(ones)
    assert layer_weights(kind, ones, torch.full((3,), float("nan"))).equal(ones)
    assert layer_weights(kind, ones, torch.full((3,), float("inf"))).equal(ones)
    weights_L = layer_weights(kind, torch.tensor([1.0, 5.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]))
    assert weights_L[1] == 1
    assert abs(weights_L.mean() - 1) < 1e-6
    assert layer_weights("adaptive", zeros, ones).equal(ones)


def test_unknown_weighting():
    with pytest.raises(ValueError, match="uniform, teacher_rms, adaptive"):
        layer_weights("loss", torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_running_mean_is_the_weighted_mean_of_all_positions(decay):
    """Position values of step s weigh ``decay ** (now - s)``; steps in which a layer had none do not age it."""
    mean, seen = RunningMean.empty(2, decay=decay), [[], []]
    assert mean.value.tolist() == [0, 0]
    for step in range(6):
        counts = [step % 3, 2]  # the first layer has none every third step
        values = [torch.rand(count) for count in counts]
        for layer, of_layer in enumerate(values):
            if len(of_layer):
                seen[layer].append(of_layer)
        before = mean
        mean = mean.updated(torch.stack([v.sum() for v in values]), torch.tensor(counts))
        assert mean is not before
        for layer, batches in enumerate(seen):
            ages = [decay**age for age in reversed(range(len(batches)))]
            total = sum(age * batch.sum() for age, batch in zip(ages, batches, strict=True))
            weight = sum(age * len(batch) for age, batch in zip(ages, batches, strict=True))
            torch.testing.assert_close(mean.value[layer], total / weight if weight else torch.tensor(0.0))
    again = RunningMean(**mean.state_dict(), decay=decay)
    assert again.value.equal(mean.value)
    one = again.updated(torch.ones(2), torch.tensor(4.0))  # one count for all
    assert one.value.equal(mean.updated(torch.ones(2), torch.tensor([4, 4])).value)


def test_running_mean_keeps_what_was_there():
    """A graph that holds an older mean is not surprised."""
    mean = RunningMean.empty(1).updated(torch.tensor([3.0]), torch.tensor([1.0]))
    held = mean.value
    mean.updated(torch.tensor([9.0]), torch.tensor([1.0]))
    assert held.item() == mean.value.item() == 3


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay"):
        RunningMean.empty(1, decay=decay)


# ------------------------------------------------------------------------------------------------ focus


M, N, D = 17, 9, 5


@pytest.fixture(params=[1, 1000], ids=lambda rows: f"slices of {rows}")
def sliced(request, monkeypatch):
    monkeypatch.setattr(streaming, "SLICE_BYTES", 4 * D * request.param)


@pytest.mark.parametrize("focus", [0.0, 1e-3, 0.7, 5.0])
@pytest.mark.parametrize("kind", ["mse", "cosine", "transition"])
def test_focus_is_a_constant_factor_of_each_position(sliced, kind, focus):
    states_Md = torch.randn(M, D).requires_grad_()
    place_N, since_N = torch.randperm(M)[:N], torch.randperm(M)[:N]
    (target_Nd, since_Nd), weights_N = torch.randn(2, N, D), torch.rand(N)
    if kind == "transition":
        since = Since(states_Md, since_N, since_Nd)
        term = transition_term(states_Md, place_N, target_Nd, weights_N, since, focus=torch.tensor(focus))
        plain = transition_term(states_Md, place_N, target_Nd, weights_N, since)
        own, other = states_Md[place_N] - states_Md[since_N], target_Nd - since_Nd
    else:
        term = state_term(states_Md, place_N, target_Nd, weights_N, kind, focus=torch.tensor(focus))
        plain = state_term(states_Md, place_N, target_Nd, weights_N, kind)
        own, other = states_Md[place_N], target_Nd
    distance_N = representation_distance(own, other, "mse" if kind == "mse" else "cosine")
    factors = [min(d / focus, 4.0) if focus else 4.0 for d in distance_N.tolist()]
    assert focus in (0.0, 1e-3) or len(set(factors)) > 1
    slow = (weights_N * torch.tensor(factors) * distance_N).sum()
    torch.testing.assert_close(term.loss, slow)
    torch.testing.assert_close(*(torch.autograd.grad(x, states_Md)[0] for x in (term.loss, slow)))
    torch.testing.assert_close(tuple(term[1:]), tuple(plain[1:]))  # what is measured knows no focus


def test_focus_where_nothing_differs():
    states_Md = torch.randn(M, D).requires_grad_()
    term = state_term(states_Md, torch.arange(M), states_Md.detach(), torch.ones(M), focus=torch.tensor(0.0))
    assert term.loss.item() == 0
    assert torch.autograd.grad(term.loss, states_Md)[0].eq(0).all()


def test_a_focus_changed_before_backward_is_noticed():
    states_Md, focus = torch.randn(M, D).requires_grad_(), torch.tensor(1.0)
    term = state_term(states_Md, torch.arange(M), torch.randn(M, D), torch.ones(M), focus=focus)
    focus.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        term.loss.backward()
