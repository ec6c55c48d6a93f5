"""How much each layer counts, from running means of what a run has seen.

Shapes: L compared layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LAYER_WEIGHTINGS = ("uniform", "teacher_rms", "adaptive")
"""What `layer_weights` takes."""
WEIGHT_LIMIT = 4.0  # `adaptive` weights lie within this factor of their mean, on either side, before it becomes 1


def layer_weights(kind: str, distance_L: Tensor, power_L: Tensor) -> Tensor:
    """Weight of every compared layer, ``[L]`` with mean 1, without gradient; the loss is ``1/L sum_l w_l loss_l``.

    ``uniform``: 1. ``teacher_rms``: proportional to ``1 / power_l``, so that a layer's mse is relative to the teacher's mean
    square there. ``adaptive``: proportional to ``distance_l / power_l``, so that layers count more the further apart student
    and teacher still are in them, clipped to ``[1/4, 4]`` times the mean and brought back to mean 1.

    A layer without an estimate (a power of 0, or estimates that are not finite) has weight 1, and if all distances are 0 so have
    all; before anything is measured every weight is 1.

    Args:
        distance_L: mean distance of each layer, `StateSums.distance` over the positions.
        power_L: mean square of the teacher's states, `StateSums.power` over the positions. Pass ones where the distance is
            free of scale already (cosine, normalized_mse, transitions).

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind not in LAYER_WEIGHTINGS:
        raise ValueError(f"layer_weighting must be one of {', '.join(LAYER_WEIGHTINGS)}, got {kind!r}.")
    power_L = power_L.detach()
    if kind == "uniform":
        return torch.ones_like(power_L)
    ratio_L = (distance_L.detach() if kind == "adaptive" else torch.ones_like(power_L)) / power_L
    known_L = ratio_L.isfinite() & power_L.isfinite() & (power_L > 0)
    weights_L = _mean_one(ratio_L, known_L)
    if kind == "adaptive":
        weights_L = _mean_one(weights_L.clamp(1 / WEIGHT_LIMIT, WEIGHT_LIMIT), known_L)
    return weights_L


def _mean_one(values_L: Tensor, known_L: Tensor) -> Tensor:
    """Divided by the mean of the known ones; 1 for the others, and for all if that mean is 0."""
    mean = values_L.masked_fill(~known_L, 0).sum() / known_L.sum().clamp(min=1)
    return torch.where(known_L & (mean > 0), values_L / mean, torch.ones_like(values_L))


@dataclass(frozen=True)
class RunningMean:
    """Exponentially averaged means, one per layer (any shape). Every update is a new object, so a graph may hold an older
    mean.

    Sums and counts are averaged alike and divided only when asked for. So a mean needs no correction for its start, a
    position weighs the same in a small and a large batch, and a layer without positions stays as it was.
    """

    sums: Tensor
    counts: Tensor
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}.")

    @classmethod
    def empty(cls, *shape: int, decay: float = 0.9, device: torch.device | str | None = None) -> RunningMean:
        """Of nothing yet."""
        return cls(torch.zeros(shape, device=device), torch.zeros(shape, device=device), decay)

    @property
    def value(self) -> Tensor:
        """The means; 0 where nothing was seen."""
        return torch.where(self.counts > 0, self.sums / self.counts, torch.zeros_like(self.sums))

    def updated(self, sums: Tensor, counts: Tensor) -> RunningMean:
        """With the sums over one step's positions and how many those are, both over all processes."""
        counts = counts.detach().to(self.counts).expand_as(self.counts)
        seen, share = counts > 0, 1 - self.decay
        return replace(
            self,
            sums=torch.where(seen, torch.lerp(self.sums, sums.detach().to(self.sums), share), self.sums),
            counts=torch.where(seen, torch.lerp(self.counts, counts, share), self.counts),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All that a checkpoint needs: ``RunningMean(**state)``, with the decay of the run."""
        return {"sums": self.sums, "counts": self.counts}
