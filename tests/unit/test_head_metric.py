import pytest
import torch

from oprd.objectives import head_grams, head_metric, logit_mse_loss

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


def gram_setting(own_width, other_width, dtype, other_dtype=None):
    own = (torch.randn(VOCAB, own_width) + 1).to(dtype).requires_grad_()
    return own, (torch.randn(VOCAB, other_width) - 0.5).to(other_dtype or dtype)


def plain_grams(own, other):
    """The three products of whole centred heads."""
    dtype = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
    own, other = (head.to(dtype) - head.to(dtype).mean(0) for head in (own, other))
    b = own - other if own.shape == other.shape else -other
    return own.T @ own / VOCAB, own.T @ b / VOCAB, b.T @ b / VOCAB


@pytest.mark.parametrize("tile", [1, 5, 1000], ids=lambda tokens: f"tiles of {tokens}")
@pytest.mark.parametrize(
    ("dtype", "other_dtype"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(("own_width", "other_width"), [(6, 6), (6, 9), (9, 4)])
def test_tiled_grams_equal_whole_ones(monkeypatch, own_width, other_width, dtype, other_dtype, tile):
    """Values, and the gradient under any gradient of each product: none of the three need be symmetric there."""
    monkeypatch.setattr(head_metric, "TILE_BYTES", 4 * own_width * tile)
    own, other = gram_setting(own_width, other_width, dtype, other_dtype)
    grams, slow = head_grams(own, other), plain_grams(own, other)
    assert grams.of_differences is (own_width == other_width)
    directions = [torch.randn_like(product) for product in slow]
    close = {"atol": 1e-10, "rtol": 1e-8} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-4}
    for ours, twin in zip(grams[:3], slow, strict=True):
        torch.testing.assert_close(ours, twin, **close)
    for chosen in ([0], [1], [2], [0, 1, 2]):
        ours, twin = (
            torch.autograd.grad(sum((g[i] * directions[i]).sum() for i in chosen), own, retain_graph=True)[0]
            if chosen != [2] or grams.of_differences
            else torch.zeros(())
            for g in (grams, slow)
        )
        assert ours.dtype == twin.dtype
        rounded = {"atol": 1e-3, "rtol": 1e-2} if dtype == torch.bfloat16 else close
        torch.testing.assert_close(ours, twin, **rounded)


@pytest.mark.parametrize(("own_width", "other_width"), [(6, 6), (6, 9)])
def test_grams_keep_the_heads_and_no_copy_of_them(own_width, other_width):
    own, other = gram_setting(own_width, other_width, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        grams = head_grams(own, other)
    assert {x.data_ptr() for x in kept} == {own.data_ptr(), other.data_ptr()}
    assert grams.own.requires_grad
    assert not head_grams(own.detach(), other).own.requires_grad
