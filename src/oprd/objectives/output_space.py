"""Next-token objectives: the baselines (Eq. 3-5). All take logits and compare in float32.

Shapes: B sequences, T positions, V vocabulary, K support; ``...`` any leading shape. ``p`` is the student's next-token
distribution, ``q`` the teacher's. Vocabulary entries at ``-inf`` on both sides take no part and get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oprd.objectives.reduction import reduce_positions

TOP_K_SUPPORTS = ("student", "teacher", "union", "intersection")

SelectedCost = Callable[[Tensor, Tensor], Tensor]  # log p, log q at some tokens [..., K] -> cost [...]


def log_probabilities(logits: Tensor) -> Tensor:
    """Log softmax over the last axis, in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _expected_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum_v p_v (log p_v - log q_v)`` over the last axis, where 0 log 0 = 0 in value and gradient."""
    possible = log_p > -torch.inf
    safe_p = torch.where(possible, log_p, 0.0)
    safe_q = torch.where(possible, log_q, 0.0)
    return (torch.where(possible, safe_p.exp(), 0.0) * (safe_p - safe_q)).sum(dim=-1)


def full_vocab_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Eq. 4 at every position: exact reverse KL(p || q), ``[..., V]`` twice -> ``[...]``, in nats."""
    return _expected_log_ratio(log_probabilities(student_logits), log_probabilities(teacher_logits.detach()))


def sampled_token(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 3 at every position: ``[..., V]`` twice and the sampled ``[...]`` -> ``[...]``, in nats.

    The value is ``log p(y) - log q(y)``. The gradient is the policy gradient ``(log p(y) - log q(y)) * d log p(y)``, with
    the first factor held constant; differentiating the value itself would give ``d log p(y)``, whose mean is zero
    (Lemma 1).
    """
    index = tokens.unsqueeze(-1)
    log_p = log_probabilities(student_logits).gather(-1, index).squeeze(-1)
    log_q = log_probabilities(teacher_logits.detach()).gather(-1, index).squeeze(-1)
    return sampled_cost(log_p, log_q)


def sampled_cost(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`sampled_token` of the token's log-probabilities ``[...]``: value ``log p - log q``, gradient that times ``d log p``."""
    cost = (log_p - log_q).detach()
    return cost + cost * (log_p - log_p.detach())


def choose_support(
    student_top: Callable[[], Tensor], teacher_top: Callable[[], Tensor], support: str
) -> tuple[Tensor, Tensor]:
    """Token ids ``[..., K]`` of a support and which of them count, bool ``[..., K]``.

    ``student_top``, ``teacher_top`` find the ids of either side's top k ``[..., k]``; one that is not needed is not called.
    """
    if support not in TOP_K_SUPPORTS:
        raise ValueError(f"top_k_support must be one of {', '.join(TOP_K_SUPPORTS)}, got {support!r}.")
    if support in ("student", "teacher"):
        alone = student_top() if support == "student" else teacher_top()
        return alone, torch.ones_like(alone, dtype=torch.bool)
    student, teacher = student_top(), teacher_top()
    shared = (teacher.unsqueeze(-1) == student.unsqueeze(-2)).any(dim=-1)
    if support == "intersection":
        return teacher, shared
    return torch.cat([student, teacher], -1), torch.cat([torch.ones_like(shared), ~shared], -1)


def top_k_selection(
    log_p: Tensor, log_q: Tensor, k: int, support: str, renormalize: bool
) -> tuple[Tensor, SelectedCost]:
    """Token ids ``[..., K]`` of the support of two distributions ``[..., V]``, and Eq. 5 as a function of their
    log-probabilities there.

    Raises:
        ValueError: k below 1 or an unknown support.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    k = min(k, log_p.shape[-1])
    index, counts = choose_support(
        lambda: log_p.detach().topk(k, dim=-1).indices, lambda: log_q.topk(k, dim=-1).indices, support
    )
    return index, lambda p, q: support_kl(p, q, counts, renormalize)


def support_kl(log_p: Tensor, log_q: Tensor, counts: Tensor, renormalize: bool) -> Tensor:
    """Reverse KL of the tokens of a support that count, ``[..., K]`` three times -> ``[...]``; 0 where none does.

    With ``renormalize`` logits do as well as log-probabilities: what is common to all tokens cancels.
    """
    log_p, log_q = log_p.masked_fill(~counts, -torch.inf), log_q.masked_fill(~counts, -torch.inf)
    if renormalize:
        empty = ~(log_p > -torch.inf).any(dim=-1, keepdim=True)  # log_softmax of all -inf would be NaN
        log_p = torch.where(empty, -torch.inf, log_p.masked_fill(empty, 0.0).log_softmax(-1))
        log_q = log_q.masked_fill(empty, 0.0).log_softmax(-1)
    return _expected_log_ratio(log_p, log_q)


def top_k_kl(
    student_logits: Tensor, teacher_logits: Tensor, k: int, support: str = "student", renormalize: bool = True
) -> Tensor:
    """Eq. 5 at every position: reverse KL on a support of about ``k`` tokens, ``[..., V]`` twice -> ``[...]``.

    ``support``: the student's top k, the teacher's, their union or their intersection (an empty one contributes 0).
    ``renormalize=True`` compares the two distributions renormalised on the support; ``False`` is the paper's experiments:
    ``sum_{v in S} p(v) (log p(v) - log q(v))`` with the full-vocabulary probabilities.
    """
    log_p, log_q = log_probabilities(student_logits), log_probabilities(teacher_logits.detach())
    index, cost = top_k_selection(log_p, log_q, k, support, renormalize)
    return cost(log_p.gather(-1, index), log_q.gather(-1, index))


def full_vocab_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, reduction: str = "sequence"
) -> Tensor:
    """Eq. 4 reduced over bool ``[B, T]``: logits ``[B, T, V]`` twice -> scalar. Logits off the mask are never read."""
    mask = mask.bool()
    return reduce_positions(full_vocab_kl(student_logits[mask], teacher_logits[mask]), mask, reduction)


def sampled_token_loss(
    student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor, *, reduction: str = "sequence"
) -> Tensor:
    """Eq. 3 reduced: logits ``[B, T, V]`` twice, tokens and bool mask ``[B, T]`` -> scalar.

    Its gradient is the policy gradient and its value the one-sample estimate of the reverse KL; see `sampled_token`.
    """
    mask = mask.bool()
    return reduce_positions(sampled_token(student_logits[mask], teacher_logits[mask], tokens[mask]), mask, reduction)


def top_k_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    k: int,
    support: str = "student",
    renormalize: bool = True,
    reduction: str = "sequence",
) -> Tensor:
    """Eq. 5 reduced: logits ``[B, T, V]`` twice, bool ``[B, T]`` -> scalar; see `top_k_kl` for the options."""
    mask = mask.bool()
    return reduce_positions(
        top_k_kl(student_logits[mask], teacher_logits[mask], k, support, renormalize), mask, reduction
    )
