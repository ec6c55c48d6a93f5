"""The head metric: exact full-vocabulary logit matching without a logit.

With heads ``W_S [V, d_S]`` and ``W_T [V, d_T]`` whose columns are centred over the vocabulary (the softmax does not see a
shift common to all tokens), the mean squared difference of the logits is a quadratic form in the hidden states:

    1/V ||W_S h_S - W_T h_T||^2 = h_S' G_SS h_S - 2 h_S' G_ST h_T + h_T' G_TT h_T,     G_XY = 1/V W_X' W_Y

The Gram matrices are d x d and cost one pass over the heads per step; no ``[B, T, V]`` tensor exists. It is OPRD measured
in the head's own metric, it trains the head too, and it works for tied heads and for models of different widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oprd.objectives.reduction import reduce_positions


class HeadGrams(NamedTuple):
    """``student [d_S, d_S]``, ``cross [d_S, d_T]``, ``teacher [d_T, d_T]``, divided by V."""

    student: Tensor
    cross: Tensor
    teacher: Tensor


def head_grams(student_head: Tensor, teacher_head: Tensor) -> HeadGrams:
    """Gram matrices of two vocabulary-centred heads ``[V, d_S]`` and ``[V, d_T]``, in float32 or wider.

    Gradients reach the student's head only. Rows are matched by token id, so both heads must cover the same tokens.
    """
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"The heads cover {student_head.shape[0]} and {teacher_head.shape[0]} tokens; cut both to the tokenizer's length."
        )
    dtype = torch.promote_types(torch.promote_types(student_head.dtype, teacher_head.dtype), torch.float32)
    size = student_head.shape[0]
    student, teacher = student_head.to(dtype), teacher_head.detach().to(dtype)
    student = student - student.mean(dim=0)
    teacher = teacher - teacher.mean(dim=0)
    return HeadGrams(student.T @ student / size, student.T @ teacher / size, teacher.T @ teacher / size)


def logit_mse(student: Tensor, teacher: Tensor, grams: HeadGrams) -> Tensor:
    """Mean over the vocabulary of the squared difference of centred logits: ``[..., d_S]``, ``[..., d_T]`` -> ``[...]``.

    A difference of large terms: near agreement, float32 rounding can leave it slightly below 0.
    """
    dtype = grams.student.dtype
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    own = ((student @ grams.student) * student).sum(dim=-1)
    cross = ((student @ grams.cross) * teacher).sum(dim=-1)
    constant = ((teacher @ grams.teacher) * teacher).sum(dim=-1)
    return own - 2 * cross + constant


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
