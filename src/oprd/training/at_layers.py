"""Loss terms of hidden states, built where a layer's states appear: points, or changes from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from oprd.objectives import Since, StateSums, state_term, transition_term
from oprd.states import Rollout, TeacherStates
from oprd.training.objective import Objective

Sums = dict[str, tuple[Tensor, Tensor]]  # name -> (sum over positions, positions)
DISTANCE, POWER = "distance", "power"  # what running means are taken of


@dataclass(frozen=True)
class Weighting:
    """What follows running means: each compared layer's weight and the mean distance at it, ``[L]``; None where all count
    alike."""

    layer_weights: Tensor | None
    focus: Tensor | None


@dataclass(frozen=True)
class Lesson:
    """What one teacher has to say about a micro-batch. ``teacher`` only lends its head; ``name`` is for the log where there
    are several teachers."""

    objective: Objective
    teacher: nn.Module
    rollout: Rollout
    targets: TeacherStates
    name: str | None = None
    weighting: Weighting | None = None


def compared_layers(objective: Objective) -> tuple[int, ...]:
    """Layers whose states are compared."""
    return objective.layers if objective.representation_weight else ()


def exact(device: torch.device):
    """Losses are in float32 whatever the forward."""
    return torch.autocast(device_type=device.type, enabled=False)


class AtLayers:
    """The terms of one lesson, layer by layer in ascending order; what is measured of them goes into ``sums``."""

    def __init__(self, lesson: Lesson, sums: Sums) -> None:
        self._lesson, self._sums, self._layers = lesson, sums, compared_layers(lesson.objective)
        self._below: Since | None = None  # the compared layer before

    def at(self, layer: int, states_BSd: Tensor) -> Tensor | None:
        """The term of a layer; None if it has none."""
        if layer not in self._layers:
            return None
        objective, pairs = self._lesson.objective, self._lesson.rollout.state_pairs
        if layer == objective.num_layers:  # nothing else keeps the last states until backward
            states_Md, place_N = pairs.of_student(states_BSd), torch.arange(len(pairs), device=states_BSd.device)
        else:
            states_Md, place_N = states_BSd.flatten(0, 1), pairs.student_places(states_BSd.shape[1])
        project = partial(objective.bridge.project_student, layer) if objective.bridge else None
        here = Since(states_Md, place_N, self._lesson.targets.layers[layer], project)
        with exact(states_BSd.device):
            if objective.representation_loss == "transition":
                return self._change(layer, here)
            found = state_term(
                states_Md,
                place_N,
                here.target_Nr,
                self._lesson.rollout.state_weights_N,
                objective.representation_loss,
                project,
                focus=self._focus(layer),
            )
        self._measure("cosine", layer, found, len(pairs))
        return found.loss

    def _change(self, layer: int, here: Since) -> Tensor | None:
        """Directions of change: from one position to the next, from the compared layer below, or half of each."""
        over, rollout = self._lesson.objective.transition_over, self._lesson.rollout
        terms: list[Tensor] = []
        if over != "layers":
            weights_N = rollout.transition_weights_N[1:]
            before = Since(here.states_Md, here.place_N[:-1], here.target_Nr[:-1], here.project)
            found = transition_term(
                here.states_Md,
                here.place_N[1:],
                here.target_Nr[1:],
                weights_N,
                before,
                here.project,
                focus=self._focus(layer),
            )
            self._measure("transition_cosine", layer, found, (weights_N > 0).sum())
            terms.append(found.loss)
        if over != "positions" and self._below is not None:
            weights_N = rollout.state_weights_N
            found = transition_term(here.states_Md, here.place_N, here.target_Nr, weights_N, self._below, here.project)
            if over == "layers":
                self._measure("transition_cosine", layer, found, len(weights_N))
                terms.append(found.loss)
            else:  # the mean over layers has one term more than there are changes between layers
                terms.append(found.loss * len(self._layers) / (len(self._layers) - 1))
        self._below = here
        return sum(terms) / (2 if over == "both" else 1) if terms else None

    def _focus(self, layer: int) -> Tensor | None:
        weighting = self._lesson.weighting
        if weighting is None or weighting.focus is None:
            return None
        return weighting.focus[self._layers.index(layer)]

    def _measure(self, what: str, layer: int, found: StateSums, count: int | Tensor) -> None:
        number = torch.as_tensor(count, dtype=torch.float32, device=found.cosine.device)
        self._sums[f"{what}/layer_{layer:02d}"] = (found.cosine, number)
        if self._lesson.objective.needs_means:
            self._sums[f"{DISTANCE}/layer_{layer:02d}"] = (found.distance, number)
            self._sums[f"{POWER}/layer_{layer:02d}"] = (found.power, number)
