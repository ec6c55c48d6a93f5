"""Distances between hidden states (Eq. 6, and Eq. 14's normalised form).

Shapes: L layers, B sequences, T positions, d width; ``...`` any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from oprd.objectives.reduction import reduce_positions
from oprd.objectives.transition import transition_loss


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).pow(2).mean(dim=-1)


def _normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).pow(2).sum(dim=-1)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


REPRESENTATION_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": _mse,
    "normalized_mse": _normalized_mse,
    "cosine": _cosine,
}
"""Distances by name: ``[..., d]`` twice -> ``[...]``. A distance of one's own is an entry here."""


def representation_distance(student: Tensor, teacher: Tensor, kind: str = "mse") -> Tensor:
    """Distance at every position, ``[..., d]`` twice -> float32 ``[...]``. Gradients reach the student only.

    ``mse`` (Eq. 6): ``1/d ||s - t||^2``. ``normalized_mse`` (Eq. 14): ``||s/|s| - t/|t|||^2``, summed over d, in [0, 4].
    ``cosine``: ``1 - cos(s, t)``, half of the former. Computed in float32 (float64 stays float64).
    """
    if kind not in REPRESENTATION_KINDS:
        raise ValueError(f"representation_loss must be one of {', '.join(REPRESENTATION_KINDS)}, got {kind!r}.")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return REPRESENTATION_KINDS[kind](student.to(dtype), teacher.detach().to(dtype))


def cosine_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine at every position, without gradient: ``[..., d]`` twice -> float32 ``[...]``."""
    with torch.no_grad():
        return F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def representation_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    kind: str = "mse",
    reduction: str = "sequence",
    layer_weights: Sequence[float] | Tensor | None = None,
    transition_over: str | None = None,
) -> Tensor:
    """Eq. 6: mean over sequences of the mean over layers and supervised positions of the distance.

    ``transition`` compares changes instead of points (arXiv 2606.29340): ``1 - cos`` of the differences between
    neighbouring supervised positions of a row, or between neighbouring layers of those given. A row with one position
    has no change over positions and weighs nothing.

    Args:
        student, teacher: ``[L, B, T, d]``; only the student gets gradients.
        mask: bool ``[B, T]``, the supervised positions. States elsewhere are never read.
        kind: ``mse``, ``normalized_mse``, ``cosine`` or ``transition``.
        reduction: ``sequence`` (Eq. 6) or ``token`` (one mean over all positions, or over all changes).
        layer_weights: ``[L]``, relative weights; the layers' mean becomes ``sum w_l loss_l / sum w_l``. A change between
            layers has the upper one's.
        transition_over: ``positions`` (the default), ``layers`` or ``both`` (their mean); for ``transition`` only.

    Returns:
        A scalar, float32 or wider; 0 with a live graph when nothing is supervised.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape.")
    mask = mask.bool()
    num_layers = student.shape[0]
    weights = torch.ones(num_layers) if layer_weights is None else torch.as_tensor(layer_weights, dtype=torch.float32)
    if weights.shape != (num_layers,) or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"layer_weights must be {num_layers} non-negative numbers with a positive sum.")
    if kind == "transition":
        return transition_loss(student, teacher, mask, weights, reduction, transition_over or "positions")
    if transition_over is not None:
        raise ValueError(f"transition_over is for kind='transition', and kind is {kind!r}: leave it out.")
    weights = weights / weights.sum()
    per_layer = [
        reduce_positions(representation_distance(student[layer][mask], teacher[layer][mask], kind), mask, reduction)
        for layer in range(num_layers)
    ]
    return sum(weight * loss for weight, loss in zip(weights.tolist(), per_layer, strict=True))
