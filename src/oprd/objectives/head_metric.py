"""The head metric: exact full-vocabulary logit matching without a logit.

With heads ``W_S [V, d_S]`` and ``W_T [V, d_T]`` whose columns are centred over the vocabulary (the softmax does not see a
shift common to all tokens), the mean squared difference of the logits is a quadratic form in the hidden states:

    1/V ||W_S h_S - W_T h_T||^2 = u' G_AA u + 2 u' G_AB v + v' G_BB v,     G_XY = 1/V X' Y

where ``A u + B v`` is the difference of the logits. The Gram matrices are d x d and cost one pass over the heads; no
``[B, T, V]`` tensor exists. It is OPRD measured in the head's own metric, it trains the head too, and it works for tied
heads and for models of different widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oprd.objectives.reduction import reduce_positions


class HeadGrams(NamedTuple):
    """Gram matrices of ``A u + B v``, divided by V, and which A, B, u, v they stand for."""

    own: Tensor
    cross: Tensor
    other: Tensor
    of_differences: bool


def head_grams(student_head: Tensor, teacher_head: Tensor) -> HeadGrams:
    """Gram matrices of two vocabulary-centred heads ``[V, d_S]`` and ``[V, d_T]``, in float32 or wider.

    Heads of one width are written as ``W_S (h_S - h_T) + (W_S - W_T) h_T``: every factor is small where the models agree,
    so nothing cancels. Other widths take ``W_S h_S - W_T h_T`` as it stands. Gradients reach the student's head only. Rows
    are matched by token id, so both heads must cover the same tokens.
    """
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"The heads cover {student_head.shape[0]} and {teacher_head.shape[0]} tokens; cut both to the tokenizer's "
            "length."
        )
    dtype = torch.promote_types(torch.promote_types(student_head.dtype, teacher_head.dtype), torch.float32)
    size = student_head.shape[0]
    student, teacher = student_head.to(dtype), teacher_head.detach().to(dtype)
    a = student - student.mean(dim=0)
    b = teacher.mean(dim=0) - teacher
    of_differences = a.shape == b.shape
    if of_differences:
        b = a + b
    return HeadGrams(a.T @ a / size, a.T @ b / size, b.T @ b / size, of_differences)


def logit_mse(student: Tensor, teacher: Tensor, grams: HeadGrams) -> Tensor:
    """Mean over the vocabulary of the squared difference of centred logits: ``[..., d_S]``, ``[..., d_T]`` -> ``[...]``.

    For models of different widths it is a difference of large terms, which rounding can leave slightly below 0.
    """
    dtype = grams.own.dtype
    u, v = student.to(dtype), teacher.detach().to(dtype)
    u = u - v if grams.of_differences else u
    return ((u @ grams.own + 2 * (v @ grams.cross.T)) * u).sum(dim=-1) + ((v @ grams.other) * v).sum(dim=-1)


def logit_mse_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    *,
    reduction: str = "sequence",
) -> Tensor:
    """Exact logit matching reduced over bool ``[B, T]``.

    Args:
        student, teacher: last hidden states ``[B, T, d_S]`` and ``[B, T, d_T]``, after the final norm.
        student_head, teacher_head: ``[V, d_S]`` and ``[V, d_T]``, the same tokens in the same rows.

    Returns:
        A scalar with gradients to the student's states and head.
    """
    mask = mask.bool()
    grams = head_grams(student_head, teacher_head)
    return reduce_positions(logit_mse(student[mask], teacher[mask], grams), mask, reduction)
