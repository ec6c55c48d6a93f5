import pytest
import torch

from oprd.objectives import logit_mse_loss

BATCH, TIME, VOCAB = 4, 8, 23


def materialised(student, teacher, mask, student_head, teacher_head, reduction):
    """The twin: form both logits, centre them over the vocabulary, square the difference."""
    own, other = student @ student_head.T, teacher @ teacher_head.T
    difference = own - own.mean(-1, keepdim=True) - (other - other.mean(-1, keepdim=True))
    per_position = difference.pow(2).mean(-1)
    if reduction == "token":
        return per_position[mask].mean()
    return torch.stack([row[on].mean() for row, on in zip(per_position, mask, strict=True) if on.any()]).mean()


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize(("own_width", "other_width"), [(6, 6), (6, 9), (9, 4)])
def test_equals_materialised_logits_with_gradients(mask_BT, reduction, own_width, other_width):
    student = torch.randn(BATCH, TIME, own_width, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(BATCH, TIME, other_width, dtype=torch.float64)
    own_head = (torch.randn(VOCAB, own_width, dtype=torch.float64) + 1).requires_grad_()
    other_head = torch.randn(VOCAB, other_width, dtype=torch.float64, requires_grad=True)
    fast = logit_mse_loss(student, teacher, mask_BT, own_head, other_head, reduction=reduction)
    slow = materialised(student, teacher, mask_BT, own_head, other_head, reduction)
    torch.testing.assert_close(fast, slow, atol=1e-7, rtol=1e-6)
    for ours, twin in zip(*(torch.autograd.grad(x, (student, own_head)) for x in (fast, slow)), strict=True):
        torch.testing.assert_close(ours, twin, atol=1e-7, rtol=1e-6)
    again = logit_mse_loss(student, teacher, mask_BT, own_head, other_head)
    assert torch.autograd.grad(again, other_head, allow_unused=True) == (None,)


def test_tied_weights_get_the_gradient_of_both_uses(mask_BT):
    """One tensor as embedding and head: autograd adds the two paths, as with materialised logits."""
    table = torch.randn(VOCAB, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(VOCAB, (BATCH, TIME))
    teacher, head = torch.randn(BATCH, TIME, 6, dtype=torch.float64), torch.randn(VOCAB, 6, dtype=torch.float64)
    fast = logit_mse_loss(table[ids].tanh(), teacher, mask_BT, table, head)
    slow = materialised(table[ids].tanh(), teacher, mask_BT, table, head, "sequence")
    torch.testing.assert_close(*(torch.autograd.grad(x, table)[0] for x in (fast, slow)))


def test_a_shift_common_to_all_tokens_costs_nothing(mask_BT):
    student = torch.randn(BATCH, TIME, 6, dtype=torch.float64)
    head = torch.randn(VOCAB, 6, dtype=torch.float64)
    shifted = head + torch.randn(6, dtype=torch.float64)  # moves every logit of a position by the same amount
    assert logit_mse_loss(student, student, mask_BT, head, shifted).abs() < 1e-12
    assert logit_mse_loss(student, student, mask_BT, head, 2 * head) > 0.1


def test_bfloat16_masks_and_no_positions(mask_BT):
    student, teacher = (torch.randn(BATCH, TIME, 6).bfloat16() for _ in range(2))
    own, other = (torch.randn(VOCAB, 6).bfloat16() for _ in range(2))
    loss = logit_mse_loss(student, teacher, mask_BT, own, other)
    assert loss.dtype == torch.float32
    spoiled = student.clone()
    spoiled[~mask_BT] = float("nan")
    torch.testing.assert_close(logit_mse_loss(spoiled, teacher, mask_BT, own, other), loss)
    live = student.float().requires_grad_()
    zero = logit_mse_loss(live, teacher, torch.zeros_like(mask_BT), own, other)
    zero.backward()
    assert zero.item() == 0
    assert live.grad.eq(0).all()


def test_heads_of_different_vocabularies_are_refused(mask_BT):
    states = torch.randn(BATCH, TIME, 6)
    with pytest.raises(ValueError, match="tokenizer's length"):
        logit_mse_loss(states, states, mask_BT, torch.randn(VOCAB, 6), torch.randn(VOCAB + 1, 6))


def test_near_agreement_nothing_cancels():
    """Two dimensions of massive activation, as real models have: float32 stays within a thousandth of float64."""
    head = torch.randn(VOCAB, 32, dtype=torch.float64)
    states = torch.randn(1, 6, 32, dtype=torch.float64)
    states[..., :2] += 300
    other, moved = head + 1e-3 * torch.randn_like(head), states + 1e-2 * torch.randn_like(states)
    one = torch.ones(1, 6, dtype=torch.bool)
    exact = logit_mse_loss(moved, states, one, head, other)
    single = logit_mse_loss(*(x.float() for x in (moved, states)), one, *(x.float() for x in (head, other)))
    assert single.item() == pytest.approx(exact.item(), rel=1e-3)
