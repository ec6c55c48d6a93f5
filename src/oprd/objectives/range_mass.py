"""Mass of ranges of a distribution whose tokens are sorted: many ranges at once, exact for small ones, with gradient.

A range is cut at blocks of the vocabulary. Whole blocks come from float64 prefix sums over blocks, the two ends from their
entries. So a small mass is not lost behind a large one, and no prefix sum has the vocabulary's length.

Shapes: n positions, V vocabulary, W the next multiple of a block above it, C blocks, K ranges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 32


class SortedMass(NamedTuple):
    """A distribution in sorted order ``[n, W]``, zero behind V, and the mass before each block ``[n, C + 1]``, float64."""

    p_nW: Tensor
    before_nC: Tensor

    def of(self, low_nK: Tensor, high_nK: Tensor) -> Tensor:
        """Mass of ``low .. high - 1``, ``[n, K]`` -> float64 ``[n, K]``; 0 where ``high <= low``."""
        width, within = self.p_nW.shape[1], torch.arange(BLOCK, device=low_nK.device)
        first_nK, last_nK = low_nK // BLOCK, high_nK // BLOCK
        spans_nK = last_nK > first_nK

        def end(block_nK: Tensor, counts_nK: Tensor) -> Tensor:
            at_nKb = block_nK.unsqueeze(2) * BLOCK + within
            inside = (at_nKb >= low_nK.unsqueeze(2)) & (at_nKb < high_nK.unsqueeze(2)) & counts_nK.unsqueeze(2)
            entries = self.p_nW.gather(1, at_nKb.clamp(max=width - 1).flatten(1)).view(at_nKb.shape)
            return torch.where(inside, entries, 0.0).sum(2, dtype=torch.float64)

        whole_nK = self.before_nC.gather(1, last_nK) - self.before_nC.gather(
            1, torch.where(spans_nK, first_nK + 1, last_nK)
        )
        return end(first_nK, torch.ones_like(spans_nK)) + end(last_nK, spans_nK) + whole_nK


@torch.no_grad()
def sorted_mass(logits_nV: Tensor, order_V: Tensor) -> SortedMass:
    """The softmax of ``logits``, float32 or wider, in an order of tokens."""
    size = len(order_V)
    order_W = torch.nn.functional.pad(order_V, (0, BLOCK - size % BLOCK))  # at least one, so that V is an index
    sorted_nW = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)).index_select(1, order_W)
    sorted_nW[:, size:] = -torch.inf
    p_nW = sorted_nW.softmax(-1)
    blocks_nC = p_nW.view(len(p_nW), len(order_W) // BLOCK, BLOCK).sum(-1).double()
    return SortedMass(p_nW, torch.nn.functional.pad(blocks_nC.cumsum(-1), (1, 0)))


class _DifferentiableMass(torch.autograd.Function):
    """`mass_of_ranges`. With ``g`` the gradient by the masses m, that by the logits is ``p_v (sum of g over the ranges that
    hold v - sum_k g_k m_k)``; the first sum is constant between the ends of ranges."""

    @staticmethod
    def forward(ctx, logits_nV: Tensor, order_V: Tensor, rank_V: Tensor, low_nK: Tensor, high_nK: Tensor) -> Tensor:
        mass = sorted_mass(logits_nV, order_V)
        mass_nK = mass.of(low_nK, high_nK)
        ctx.save_for_backward(mass.p_nW, mass_nK, rank_V, low_nK, high_nK)
        ctx.dtype = logits_nV.dtype
        return mass_nK

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_nK: Tensor):
        p_nW, mass_nK, rank_V, low_nK, high_nK = ctx.saved_tensors
        mean_n1 = (gradient_nK * mass_nK).sum(1, keepdim=True).to(p_nW.dtype)
        steps_nK = torch.where(high_nK > low_nK, gradient_nK, 0.0).to(p_nW.dtype)
        gradient_nW = torch.zeros_like(p_nW)
        gradient_nW.scatter_add_(1, low_nK, steps_nK).scatter_add_(1, high_nK, -steps_nK)
        gradient_nW.cumsum_(1).sub_(mean_n1).mul_(p_nW)
        return gradient_nW.index_select(1, rank_V).to(ctx.dtype), None, None, None, None


def mass_of_ranges(logits_nV: Tensor, rank_V: Tensor, low_nK: Tensor, high_nK: Tensor) -> Tensor:
    """Mass of tokens whose rank is ``low .. high - 1`` under ``softmax(logits)``, ``[n, K]``, float64, with gradient.

    ``rank_V`` is each token's place in the order, a permutation.
    """
    order_V = torch.empty_like(rank_V).scatter_(0, rank_V, torch.arange(len(rank_V), device=rank_V.device))
    return _DifferentiableMass.apply(logits_nV, order_V, rank_V, low_nK, high_nK)
