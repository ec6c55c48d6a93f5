import pytest
import torch

from oprd.objectives import representation_loss

LAYERS, BATCH, TIME, WIDTH = 3, 4, 8, 5


@pytest.fixture
def states():
    make = lambda: torch.randn(LAYERS, BATCH, TIME, WIDTH, dtype=torch.float64)  # noqa: E731
    return make().requires_grad_(), make()


def one_distance(student_d, teacher_d, kind):
    """Straight from the definitions, one vector at a time."""
    if kind == "mse":
        return sum((s - t) ** 2 for s, t in zip(student_d, teacher_d, strict=True)) / WIDTH
    s, t = student_d / student_d.norm(), teacher_d / teacher_d.norm()
    return ((s - t) ** 2).sum() if kind == "normalized_mse" else 1 - (s * t).sum()


def naive(student, teacher, mask, kind, reduction, weights):
    """Eq. 6 as loops over sequences, layers and positions."""
    rows, pooled = [], []
    for b in range(BATCH):
        where = [t for t in range(TIME) if mask[b, t]]
        if not where:
            continue
        per_position = [
            sum(w * one_distance(student[layer, b, t], teacher[layer, b, t], kind) for layer, w in enumerate(weights))
            / sum(weights)
            for t in where
        ]
        rows.append(sum(per_position) / len(per_position))
        pooled += per_position
    return sum(rows) / len(rows) if reduction == "sequence" else sum(pooled) / len(pooled)


@pytest.mark.parametrize("kind", ["mse", "normalized_mse", "cosine"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_equals_the_loops_with_gradients(states, mask_BT, kind, reduction, weights):
    student, teacher = states
    fast = representation_loss(student, teacher, mask_BT, kind=kind, reduction=reduction, layer_weights=weights)
    slow = naive(student, teacher, mask_BT, kind, reduction, weights or [1.0] * LAYERS)
    torch.testing.assert_close(fast, slow, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (fast, slow)), atol=1e-8, rtol=1e-6)


def test_states_off_the_mask_are_never_read(states, mask_BT):
    student, teacher = states
    spoiled = student.detach().clone()
    spoiled[:, ~mask_BT] = float("nan")
    spoiled.requires_grad_()
    loss = representation_loss(spoiled, teacher, mask_BT)
    torch.testing.assert_close(loss, representation_loss(student, teacher, mask_BT))
    loss.backward()
    assert torch.isfinite(spoiled.grad).all()
    assert spoiled.grad[:, ~mask_BT].eq(0).all()


def test_nothing_supervised_is_zero_with_a_graph(states):
    student, teacher = states
    loss = representation_loss(student, teacher, torch.zeros(BATCH, TIME, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert student.grad.eq(0).all()


def test_the_teacher_gets_no_gradient(mask_BT):
    student, teacher = (torch.randn(LAYERS, BATCH, TIME, WIDTH, requires_grad=True) for _ in range(2))
    representation_loss(student, teacher, mask_BT).backward()
    assert teacher.grad is None


def test_bfloat16_states_are_compared_in_float32(mask_BT):
    student, teacher = (torch.randn(LAYERS, BATCH, TIME, 512).bfloat16() for _ in range(2))
    loss = representation_loss(student, teacher, mask_BT)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, representation_loss(student.float(), teacher.float(), mask_BT))


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
def test_bad_layer_weights(states, mask_BT, weights):
    with pytest.raises(ValueError, match="layer_weights"):
        representation_loss(*states, mask_BT, layer_weights=weights)


def test_unknown_kind_and_shapes(states, mask_BT):
    with pytest.raises(ValueError, match="normalized_mse"):
        representation_loss(*states, mask_BT, kind="l1")
    with pytest.raises(ValueError, match="same shape"):
        representation_loss(states[0], states[1][:1], mask_BT)
