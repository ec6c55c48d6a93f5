import pytest
import torch

from oprd.objectives import full_vocab_loss, sampled_token_loss, top_k_loss

BATCH, TIME, VOCAB = 4, 8, 11


@pytest.fixture
def logits():
    make = lambda: 2 * torch.randn(BATCH, TIME, VOCAB, dtype=torch.float64)  # noqa: E731
    return make().requires_grad_(), make()


def mean_over(mask, reduction, value):
    """Loop over the mask with a per-position function."""
    rows = [[value(b, t) for t in range(TIME) if mask[b, t]] for b in range(BATCH)]
    rows = [row for row in rows if row]
    if reduction == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    pooled = [v for row in rows for v in row]
    return sum(pooled) / len(pooled)


def same_with_gradients(fast, slow, student):
    torch.testing.assert_close(fast, slow, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (fast, slow)), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_full_vocabulary_equals_the_definition(logits, mask_BT, reduction):
    student, teacher = logits
    p, q = student.softmax(-1), teacher.softmax(-1)
    slow = mean_over(mask_BT, reduction, lambda b, t: (p[b, t] * (p[b, t].log() - q[b, t].log())).sum())
    same_with_gradients(full_vocab_loss(student, teacher, mask_BT, reduction=reduction), slow, student)


def naive_support(p, q, k, support):
    own, other = (set(x.argsort(descending=True)[:k].tolist()) for x in (p, q))
    return sorted({"student": own, "teacher": other, "union": own | other, "intersection": own & other}[support])


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
def test_top_k_equals_the_definition(logits, mask_BT, support, renormalize, reduction):
    student, teacher = logits
    p, q = student.softmax(-1), teacher.softmax(-1)

    def value(b, t):
        keep = naive_support(p[b, t], q[b, t], 3, support)
        if not keep:
            return student[b, t].sum() * 0
        ps, qs = p[b, t][keep], q[b, t][keep]
        if renormalize:
            ps, qs = ps / ps.sum(), qs / qs.sum()
        return (ps * (ps.log() - qs.log())).sum()

    fast = top_k_loss(student, teacher, mask_BT, k=3, support=support, renormalize=renormalize, reduction=reduction)
    same_with_gradients(fast, mean_over(mask_BT, reduction, value), student)


def test_an_empty_intersection_contributes_nothing():
    student = torch.tensor([[[9.0, 8.0, 0.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, 0.0, 8.0, 9.0]]])
    for renormalize in (True, False):
        loss = top_k_loss(student, teacher, torch.ones(1, 1), k=2, support="intersection", renormalize=renormalize)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, student)[0].eq(0).all()


def test_top_k_over_the_whole_vocabulary_is_the_full_loss(logits, mask_BT):
    for support in ("student", "teacher", "union", "intersection"):
        torch.testing.assert_close(
            top_k_loss(*logits, mask_BT, k=99, support=support), full_vocab_loss(*logits, mask_BT)
        )


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_sampled_token_value_and_gradient(logits, mask_BT, reduction):
    student, teacher = logits
    tokens = torch.randint(VOCAB, (BATCH, TIME))
    log_p, log_q = (x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (student, teacher))
    loss = sampled_token_loss(student, teacher, tokens, mask_BT, reduction=reduction)
    torch.testing.assert_close(
        loss, mean_over(mask_BT, reduction, lambda b, t: (log_p - log_q)[b, t]), atol=1e-7, rtol=1e-6
    )
    reward = (log_q - log_p).detach()
    policy_gradient = mean_over(mask_BT, reduction, lambda b, t: -reward[b, t] * log_p[b, t])
    torch.testing.assert_close(
        *(torch.autograd.grad(x, student)[0] for x in (loss, policy_gradient)), atol=1e-8, rtol=1e-6
    )


def test_sampled_token_gradient_is_that_of_the_kl_on_average():
    """Over all tokens, weighted by their probability, ours gives the exact KL gradient; naive autodiff gives zero."""
    student = torch.randn(1, 1, VOCAB, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 1, VOCAB, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.bool)
    ours, naive = torch.zeros_like(student), torch.zeros_like(student)
    for token in range(VOCAB):
        y = torch.tensor([[token]])
        probability = student.softmax(-1)[0, 0, token].detach()
        ours += probability * torch.autograd.grad(sampled_token_loss(student, teacher, y, one), student)[0]
        eq3 = student.log_softmax(-1)[0, 0, token] - teacher.log_softmax(-1)[0, 0, token]
        naive += probability * torch.autograd.grad(eq3, student)[0]
    exact = torch.autograd.grad(full_vocab_loss(student, teacher, one), student)[0]
    torch.testing.assert_close(ours, exact)
    assert exact.abs().max() > 1e-2
    assert naive.abs().max() < 1e-12


@pytest.mark.parametrize("loss", ["full", "top_k", "top_k_sum", "sampled"])
def test_impossible_tokens_take_no_part(loss, mask_BT):
    """Entries at -inf on both sides: the value is that of the smaller vocabulary, and no gradient is NaN."""
    student = torch.randn(BATCH, TIME, VOCAB, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(BATCH, TIME, VOCAB, dtype=torch.float64)
    tokens = torch.randint(VOCAB - 3, (BATCH, TIME))
    hide = torch.zeros(VOCAB, dtype=torch.double).index_fill(0, torch.arange(VOCAB - 3, VOCAB), -torch.inf)
    run = {
        "full": lambda s, t: full_vocab_loss(s, t, mask_BT),
        "top_k": lambda s, t: top_k_loss(s, t, mask_BT, k=10, support="union"),
        "top_k_sum": lambda s, t: top_k_loss(s, t, mask_BT, k=10, renormalize=False),
        "sampled": lambda s, t: sampled_token_loss(s, t, tokens, mask_BT),
    }[loss]
    masked = run(student + hide, teacher + hide)
    torch.testing.assert_close(masked, run(student[..., :-3], teacher[..., :-3]))
    gradient = torch.autograd.grad(masked, student)[0]
    assert torch.isfinite(gradient).all()
    assert gradient[..., -3:].eq(0).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("loss", ["full", "top_k", "sampled"])
def test_off_the_mask_and_bfloat16(loss, mask_BT):
    student, teacher = (torch.randn(BATCH, TIME, VOCAB).bfloat16() for _ in range(2))
    tokens = torch.randint(VOCAB, (BATCH, TIME))
    run = {
        "full": lambda s: full_vocab_loss(s, teacher, mask_BT),
        "top_k": lambda s: top_k_loss(s, teacher, mask_BT, k=4),
        "sampled": lambda s: sampled_token_loss(s, teacher, tokens, mask_BT),
    }[loss]
    spoiled = student.clone()
    spoiled[~mask_BT] = float("nan")
    spoiled.requires_grad_()
    value = run(spoiled)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, run(student.float()))
    value.backward()
    assert torch.isfinite(spoiled.grad).all()
    nothing = torch.zeros_like(mask_BT)
    assert full_vocab_loss(student, teacher, nothing).item() == 0


def test_refusals(logits, mask_BT):
    with pytest.raises(ValueError, match="at least 1"):
        top_k_loss(*logits, mask_BT, k=0)
    with pytest.raises(ValueError, match="intersection"):
        top_k_loss(*logits, mask_BT, k=2, support="both")
