"""Attention maps on a bounded number of keys: where the student looks against where the teacher looks.

A query's keys are the ``keys`` most recent tokens of its document, itself among them, and its first token, which many models
park their attention on. So a map is ``[N, H, keys + 1]`` whatever the length. Nothing of that size outlives a slice of
queries but the teacher's maps: queries and keys are the ones that attention keeps for its own backward, and backward
gathers and compares again.

The teacher's maps are taken in its forward and kept, rather than its queries and keys: with ``keys`` up to the head size
they are smaller than the queries alone, and the keys of every token come on top of those.

Shapes: P places (all tokens of a micro-batch), N supervised queries, n of a slice, H query heads, G key heads (H = G g),
h head size, K = keys + 1: column j < keys is the token j before the query, column ``keys`` the document's first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oprd.objectives.projection import rows_that_fit


def key_places(place_N: Tensor, position_N: Tensor, keys: int, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Places of each query's keys, ``[N, K]``, and which of them exist, bool ``[N, K]``; the others name the query itself.

    A document's tokens lie side by side, so the key j tokens before a query at place p is at ``p - j``. No key comes twice:
    the first token has a column of its own only where it is not among the recent ones.

    Args:
        place_N: where the queries are.
        position_N: how many tokens of its document are before each.
        keys: how many of the most recent tokens, the query's own among them.
        window: of a sliding window, how many of the most recent tokens are seen; all by default.
    """
    if keys < 1:
        raise ValueError(f"keys must be at least 1 (the query's own token), got {keys}.")
    recent_k = torch.arange(keys, device=place_N.device)
    back_NK = torch.cat([recent_k.expand(len(place_N), keys), position_N.unsqueeze(1)], dim=1)
    exists_NK = back_NK <= position_N.unsqueeze(1)
    exists_NK[:, keys] = position_N >= keys
    if window is not None:
        exists_NK = exists_NK & (back_NK < window)
    return place_N.unsqueeze(1) - back_NK.masked_fill(~exists_NK, 0), exists_NK


class _Gathered(NamedTuple):
    """A slice's queries and keys in float32 (or wider), by key head: that is how they are multiplied."""

    query_Gngh: Tensor
    key_GnKh: Tensor
    key_rows_GnK: Tensor  # of [P * G, h]
    exists_nK: Tensor

    def scores(self, scaling: float) -> Tensor:
        """``scaling * q k``, ``[G, n, g, K]``."""
        return torch.matmul(self.query_Gngh, self.key_GnKh.mT).mul_(scaling)


def _gather(
    query_PHh: Tensor, key_PGh: Tensor, place_n: Tensor, position_n: Tensor, keys: int, window: int | None
) -> _Gathered:
    groups, exact = key_PGh.shape[1], torch.promote_types(query_PHh.dtype, torch.float32)
    place_nK, exists_nK = key_places(place_n, position_n, keys, window)
    query_Gngh = query_PHh.index_select(0, place_n).unflatten(1, (groups, -1)).transpose(0, 1)
    rows_GnK = place_nK * groups + torch.arange(groups, device=place_n.device)[:, None, None]
    key_GnKh = key_PGh.flatten(0, 1).index_select(0, rows_GnK.flatten()).unflatten(0, rows_GnK.shape)
    return _Gathered(query_Gngh.to(exact), key_GnKh.to(exact), rows_GnK, exists_nK)


def _slices(query_PHh: Tensor, key_PGh: Tensor, queries: int, keys: int) -> list[slice]:
    """Of queries whose gathered keys and scores fit."""
    per_query = 4 * (keys + 1) * (key_PGh.shape[1] * key_PGh.shape[2] + query_PHh.shape[1])
    size = rows_that_fit(per_query, query_PHh.device)
    return [slice(start, start + size) for start in range(0, queries, size)]


@torch.no_grad()
def teacher_maps(
    query_PHh: Tensor,
    key_PGh: Tensor,
    place_N: Tensor,
    position_N: Tensor,
    keys: int,
    scaling: float | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Log-probabilities of each query's bounded keys, ``[N, H, K]`` in ``dtype``, minus infinity where there is no key.

    ``log softmax_j (scaling * q_n k_j)`` over the keys of `key_places`, computed in float32. In half precision float16 is the
    better one for logarithms: they need digits, not range.

    Args:
        query_PHh, key_PGh: after rotary embedding and norms, all places.
        scaling: ``h ** -0.5`` by default.
    """
    scaling = query_PHh.shape[2] ** -0.5 if scaling is None else scaling
    maps_NHK = query_PHh.new_empty(len(place_N), query_PHh.shape[1], keys + 1, dtype=dtype)
    with torch.autocast(query_PHh.device.type, enabled=False):
        for part in _slices(query_PHh, key_PGh, len(place_N), keys):
            found = _gather(query_PHh, key_PGh, place_N[part], position_N[part], keys, window)
            scores_GngK = found.scores(scaling).masked_fill_(~found.exists_nK.unsqueeze(1), -torch.inf)
            maps_NHK[part] = scores_GngK.log_softmax(-1).transpose(0, 1).flatten(1, 2).to(dtype)
    return maps_NHK


class _MapTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query_PHh: Tensor,
        key_PGh: Tensor,
        teacher_NHK: Tensor,
        place_N: Tensor,
        position_N: Tensor,
        weights_N: Tensor,
        keys: int,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query_PHh, key_PGh, teacher_NHK, place_N, position_N, weights_N)
        ctx.settings = keys, scaling, window
        loss = weights_N.new_zeros(())
        with torch.autocast(query_PHh.device.type, enabled=False):
            for part in _slices(query_PHh, key_PGh, len(place_N), keys):
                found = _gather(query_PHh, key_PGh, place_N[part], position_N[part], keys, window)
                own_GngK, other_GngK = _logs(found, teacher_NHK[part], scaling)
                cost_GngK = torch.where(other_GngK == -torch.inf, 0, other_GngK.exp() * (other_GngK - own_GngK))
                cost_n = cost_GngK.sum((0, 2, 3)) / query_PHh.shape[1]
                loss = loss + (weights_N[part] * cost_n).sum()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """By the scores a map's KL has the gradient ``p - q`` (own minus the teacher's probabilities)."""
        query_PHh, key_PGh, teacher_NHK, place_N, position_N, weights_N = ctx.saved_tensors
        keys, scaling, window = ctx.settings
        wants_query, wants_key = ctx.needs_input_grad[:2]
        grad_query_PHh = torch.zeros_like(query_PHh) if wants_query else None
        # A key serves many queries, so its gradient is a long sum and is rounded once.
        exact = torch.promote_types(key_PGh.dtype, torch.float32)
        grad_key_PGh = torch.zeros(key_PGh.shape, dtype=exact, device=key_PGh.device) if wants_key else None
        with torch.autocast(query_PHh.device.type, enabled=False):
            for part in _slices(query_PHh, key_PGh, len(place_N), keys):
                found = _gather(query_PHh, key_PGh, place_N[part], position_N[part], keys, window)
                own_GngK, other_GngK = _logs(found, teacher_NHK[part], scaling)
                share_n11 = (grad * weights_N[part] * (scaling / query_PHh.shape[1])).to(own_GngK.dtype)[:, None, None]
                slope_GngK = own_GngK.exp_().sub_(other_GngK.exp_()).mul_(share_n11)
                if grad_query_PHh is not None:
                    grad_nHh = torch.matmul(slope_GngK, found.key_GnKh).transpose(0, 1).flatten(1, 2)
                    grad_query_PHh.index_add_(0, place_N[part], grad_nHh.to(query_PHh.dtype))
                if grad_key_PGh is not None:
                    grad_GnKh = torch.matmul(slope_GngK.mT, found.query_Gngh)
                    rows = found.key_rows_GnK.flatten()
                    grad_key_PGh.view(-1, key_PGh.shape[2]).index_add_(0, rows, grad_GnKh.flatten(0, 2).to(exact))
        grad_key = None if grad_key_PGh is None else grad_key_PGh.to(key_PGh.dtype)
        return grad_query_PHh, grad_key, *(None,) * 7


def _logs(found: _Gathered, teacher_nHK: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both sides ``[G, n, g, K]`` over the keys that both have; each sums to 1 whatever was rounded."""
    scores_GngK = found.scores(scaling)
    other_nHK = teacher_nHK.to(scores_GngK.device, scores_GngK.dtype, non_blocking=True)
    other_GngK = other_nHK.unflatten(1, (scores_GngK.shape[0], -1)).transpose(0, 1)
    lacking_GngK = ~found.exists_nK.unsqueeze(1) | (other_GngK == -torch.inf)
    own_GngK = scores_GngK.masked_fill_(lacking_GngK, -torch.inf).log_softmax(-1)
    return own_GngK, other_GngK.masked_fill(lacking_GngK, -torch.inf).log_softmax(-1)


def attention_map_loss(
    query_PHh: Tensor,
    key_PGh: Tensor,
    teacher_NHK: Tensor,
    place_N: Tensor,
    position_N: Tensor,
    weights_N: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """``sum_n weight_n * 1/H sum_h KL(teacher_nh || student_nh)`` between maps over the keys of `key_places`, in nats.

    Args:
        query_PHh, key_PGh: the student's, after rotary embedding and norms, at all places; both get gradients.
        teacher_NHK: log-probabilities from `teacher_maps`, on any device, without gradient. The teacher has read the same
            tokens, and head i is compared with head i.
        place_N: the supervised queries, each once.
        position_N: how many tokens of its document are before each.
        weights_N: float32.
        scaling: ``h ** -0.5`` by default.
        window: the student's sliding window, if this layer has one. Keys that one side does not see count on neither.

    Returns:
        A scalar, float32. Without positions 0, with a live graph.

    Raises:
        ValueError: maps of another number of queries or heads, or key heads that do not divide the query heads.
    """
    queries, heads = len(place_N), query_PHh.shape[1]
    if teacher_NHK.shape[:2] != (queries, heads):
        raise ValueError(
            f"The teacher's maps are of {teacher_NHK.shape[0]} queries and {teacher_NHK.shape[1]} heads, the student's of "
            f"{queries} and {heads}. Attention maps need a teacher with as many heads, asked about the same positions."
        )
    if heads % key_PGh.shape[1]:
        raise ValueError(f"{key_PGh.shape[1]} key heads cannot serve {heads} query heads evenly.")
    scaling = query_PHh.shape[2] ** -0.5 if scaling is None else scaling
    keys = teacher_NHK.shape[2] - 1
    return _MapTerm.apply(query_PHh, key_PGh, teacher_NHK, place_N, position_N, weights_N, keys, float(scaling), window)
