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
    own, cross, other = _Grams.apply(student_head, teacher_head.detach())
    return HeadGrams(own, cross, other, student_head.shape == teacher_head.shape)


TILE_BYTES = 64 * 2**20  # of one float32 copy of a tile of a head


class _Grams(torch.autograd.Function):
    """The three products, a tile of tokens at a time: no head-sized copy but the gradient itself.

    With centred a and b, ``own = a'a / V``, ``cross = a'b / V``, ``other = b'b / V``, so that ``dL/da = (a (G_own + G_own')
    + b G_cross') / V`` and ``dL/db = (a G_cross + b (G_other + G_other')) / V``, where G is the gradient of a product. Both
    are centred, as a and b are.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        ctx.means = tuple(_mean(head, dtype) for head in (student, teacher))
        ctx.save_for_backward(student, teacher)
        grams: list[Tensor] | None = None
        for a, b, _ in _centred_tiles(student, teacher, ctx.means):
            products = [a.T @ a, a.T @ b, b.T @ b]
            grams = products if grams is None else [g.add_(p) for g, p in zip(grams, products, strict=True)]
        return tuple(g / len(student) for g in grams)

    @staticmethod
    def backward(ctx, own: Tensor, cross: Tensor, other: Tensor) -> tuple[Tensor | None, None]:
        student, teacher = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None
        by_a, by_b = own + own.T, cross.T
        if student.shape == teacher.shape:  # b moves with the student too
            by_a, by_b = by_a + cross, by_b + other + other.T
        grad = torch.empty_like(student)
        for a, b, part in _centred_tiles(student, teacher, ctx.means):
            grad[part] = (torch.addmm(a @ by_a, b, by_b) / len(student)).to(grad.dtype)
        return grad, None


def _tiles(head: Tensor) -> list[slice]:
    size = max(TILE_BYTES // (4 * head.shape[1]), 1)
    return [slice(start, start + size) for start in range(0, len(head), size)]


def _mean(head: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([head[part].sum(0, dtype=dtype) for part in _tiles(head)]).sum(0) / len(head)


def _centred_tiles(student: Tensor, teacher: Tensor, means: tuple[Tensor, Tensor]):
    """``a = W_S``, ``b = -W_T`` or, for heads of one width, ``W_S - W_T``; centred, with the tokens they cover."""
    for part in _tiles(student):
        a = student[part].to(means[0].dtype) - means[0]
        b = means[1] - teacher[part].to(means[1].dtype)
        yield a, a + b if student.shape == teacher.shape else b, part


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
