"""Changes instead of points: the directions in which states move are compared, their places and lengths are not.

A change is the difference of two states, between neighbouring compared positions of a response or between compared layers,
as in "Privileged Hidden Flow" (arXiv 2606.29340). What is the same in every state of a model, a constant offset say, is in
no change.

Shapes: L layers, B sequences, T positions, N supervised positions in row-major order, d width; ``...`` any leading shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd.objectives.reduction import reduce_positions

TRANSITION_OVER = ("positions", "layers", "both")
"""Which changes are compared: from one position to the next, from one layer to the next, or both."""


def transition_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cos`` of two changes, ``[..., d]`` twice -> float32 (or wider) ``[...]``, in [0, 2]. Gradients reach the
    student's only.

    A change of length 0 has no direction: its cosine counts as 0, so its distance is 1 and its gradient 0.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return 1 - (_unit(student.to(dtype)) * _unit(teacher.detach().to(dtype))).sum(dim=-1)


def _unit(change: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(change, dim=-1, keepdim=True)
    return change / length.masked_fill(length == 0, torch.inf)


def previous_positions(row_N: Tensor) -> Tensor:
    """Index of the pair before each one in its response, ``[N] -> [N]``, -1 for a response's first.

    ``row_N`` is the response of each pair, the pairs of one response side by side and in order. In packed readings that is
    the document (`Reading.document_of`), not the row.
    """
    index_N = torch.arange(len(row_N), device=row_N.device) - 1
    return index_N.masked_fill(row_N != row_N.roll(1), -1)


def with_previous(mask_BT: Tensor) -> Tensor:
    """The masked-in positions that have one before them in their row: bool ``[B, T]`` -> bool ``[B, T]``, one fewer in
    every row that has any. A transition's weight is that of the position it leads to."""
    mask = mask_BT.bool()
    return mask & (mask.cumsum(dim=1) > 1)


def transition_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, layer_weights: Tensor, reduction: str, over: str
) -> Tensor:
    """The plain form of transition matching, ``[L, B, T, d]`` twice -> scalar; see `representation_loss`.

    With ``D s`` the change of a state: ``sum_l w_l sum_n v_n (1 - cos(D s_ln, D t_ln)) / sum_l w_l``.

    Raises:
        ValueError: unknown ``over``; changes between layers where only one is compared, or where none above the first
            has a weight.
    """
    if over not in TRANSITION_OVER:
        raise ValueError(f"transition_over must be one of {', '.join(TRANSITION_OVER)}, got {over!r}.")
    if over == "both":
        parts = [transition_loss(student, teacher, mask, layer_weights, reduction, o) for o in TRANSITION_OVER[:2]]
        return (parts[0] + parts[1]) / 2
    kept, upper = mask, slice(None)
    if over == "positions":
        kept = with_previous(mask)
        previous_N = previous_positions(mask.nonzero()[:, 0])
        to_n = (previous_N >= 0).nonzero().squeeze(1)
        from_n = previous_N[to_n]
    else:
        upper = slice(1, None)
        if not layer_weights[upper].sum() > 0:
            raise ValueError(
                "Changes between layers need two compared layers, and a weight above 0 for one but the first. Choose more "
                "layers, or transition_over='positions'."
            )
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for layer, weight in list(enumerate(layer_weights.tolist()))[upper]:
        changes = []
        for states_LBTd in (student, teacher):
            states_Nd = _exact(states_LBTd[layer][mask])
            if over == "positions":
                changes.append(states_Nd[to_n] - states_Nd[from_n])
            else:
                changes.append(states_Nd - _exact(states_LBTd[layer - 1][mask]))
        total = total + weight * reduce_positions(transition_distance(*changes), kept, reduction)
    return total / layer_weights[upper].sum().item()


def _exact(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
