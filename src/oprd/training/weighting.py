"""Running means of what is measured at the layers, and the weights that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from oprd.objectives import RunningMean, layer_weights
from oprd.training.at_layers import DISTANCE, POWER, Weighting
from oprd.training.meters import Meters
from oprd.training.objective import Objective
from oprd.training.teachers import Teacher


class LayerMeans(TrainerCallback):
    """Per compared layer: how far the student is from one teacher, and how large the teacher's states are; over all
    processes, brought up to date after every update.

    Args:
        meters: what adds up the sums of an update.
        name: the teacher's, where there are several.
    """

    def __init__(self, objective: Objective, meters: Meters, accelerator: Accelerator, name: str | None) -> None:
        self._objective, self._meters, self._accelerator = objective, meters, accelerator
        self._prefix = "" if name is None else f"{name}/"
        empty = RunningMean.empty(len(objective.layers), device=accelerator.device)
        self._keep(empty, empty)

    def _keep(self, distance: RunningMean, power: RunningMean) -> None:
        self._distance, self._power = distance, power
        self.weighting = self._weighting()

    def _weighting(self) -> Weighting:
        """As of now; uniform until something has been measured. Once an update, since it waits for the device."""
        objective, distance, power = self._objective, self._distance.value, self._power.value
        weights = focus = None
        if objective.layer_weighting != "uniform":
            has_scale = objective.representation_loss == "mse"
            weights = layer_weights(objective.layer_weighting, distance, power if has_scale else torch.ones_like(power))
        if objective.positions == "adaptive" and bool((distance > 0).all()):
            focus = distance
        return Weighting(weights, focus)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an update. Every process must call it."""
        found = torch.stack([self._since_update(DISTANCE), self._since_update(POWER)])
        found = self._accelerator.reduce(found, reduction="sum")
        (distances, counts), (powers, _) = found
        if found.isfinite().all():  # else the update was left out
            self._keep(self._distance.updated(distances, counts), self._power.updated(powers, counts))

    def _since_update(self, what: str) -> Tensor:
        """``[2, L]``: sums and counts."""
        zero = torch.zeros((), device=self._accelerator.device)
        names = [f"{self._prefix}{what}/layer_{layer:02d}" for layer in self._objective.layers]
        pairs = [self._meters.of_update.pop(name, (zero, zero)) for name in names]
        return torch.stack([torch.stack([part.float() for part in side]) for side in zip(*pairs, strict=True)])

    def state_dict(self) -> dict[str, Tensor]:
        """As a checkpoint holds it."""
        named = {"distance": self._distance, "power": self._power}
        return {f"{name}.{key}": value for name, mean in named.items() for key, value in mean.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for means of other layers."""
        if state["distance.sums"].shape != (len(self._objective.layers),):
            raise ValueError(
                "The checkpoint's running means are of other layers. Resume with its layers, or start a new run."
            )
        device = self._accelerator.device
        means = (
            RunningMean(*(state[f"{name}.{key}"].to(device) for key in ("sums", "counts")))
            for name in ("distance", "power")
        )
        self._keep(*means)


def layer_means(teachers: Sequence[Teacher], meters: Meters, accelerator: Accelerator) -> dict[str | None, LayerMeans]:
    """Of every teacher whose weights follow them, by name."""
    return {
        teacher.name: LayerMeans(teacher.objective, meters, accelerator, teacher.name)
        for teacher in teachers
        if teacher.objective.needs_means
    }
