"""From per-position values to a scalar: one weight per position, summed once.

Shapes: B sequences, T positions, N supervised positions (the mask's true entries in row-major order).

Every loss of this package is ``sum_n weight_n * value_n``. The weights already hold every denominator, so a batch can be
cut into micro-batches or spread over processes and the sum stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("sequence", "token")


def position_weights(
    mask_BT: Tensor,
    reduction: str = "sequence",
    *,
    num_sequences: Tensor | float | None = None,
    num_positions: Tensor | float | None = None,
) -> Tensor:
    """Weight of every position, float32 ``[B, T]``, zero where the mask is false.

    ``sequence`` (Eq. 6): ``1 / (row's positions * num_sequences)``; a row without positions counts for nothing.
    ``token``: ``1 / num_positions``.

    ``num_sequences`` (rows with at least one position) and ``num_positions`` default to this mask's own counts; pass the
    global ones when the mask is one piece of a larger batch.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    mask = mask_BT.to(torch.float32)
    row_counts = mask.sum(dim=1, keepdim=True)
    if reduction == "sequence":
        total = (row_counts > 0).sum() if num_sequences is None else num_sequences
        per_row = mask / row_counts.clamp(min=1)
    else:
        total = row_counts.sum() if num_positions is None else num_positions
        per_row = mask
    total = torch.as_tensor(total, dtype=torch.float32, device=mask.device)
    return per_row / total.clamp(min=1)


def reduce_positions(values_N: Tensor, mask_BT: Tensor, reduction: str) -> Tensor:
    """Weighted sum, in the values' own precision, over the mask's true positions. No positions: 0, with a live graph."""
    return (values_N * position_weights(mask_BT, reduction)[mask_BT.bool()].to(values_N.dtype)).sum()
