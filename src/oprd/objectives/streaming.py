"""A layer's state loss that keeps nothing of its own until backward.

Written with plain operations, ``sum_n w_n d(s_n, t_n)`` keeps the gathered states and their difference in float32, N x d
for every layer, from forward to backward. Here backward gathers and compares again, a slice of positions at a time: what is
held is the layer's output, which the next block holds anyway, and the targets.

Shapes: M places of a layer, N supervised ones, n of a slice, d width, r width of the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from oprd.objectives.representation import cosine_similarity, representation_distance
from oprd.objectives.transition import transition_distance

SLICE_BYTES = 16 * 2**20  # of one float32 copy of a slice's states
FOCUS_LIMIT = 4.0  # how many times its share a position may count

Project = Callable[[Tensor], Tensor]  # states [n, d] -> [n, r]
Distance = Callable[[Tensor, Tensor], Tensor]  # [n, r] twice -> [n]


class StateSums(NamedTuple):
    """Sums over positions, scalars. Only ``loss`` is weighted, and only it has a gradient; the others count the positions
    whose weight is not 0.

    ``cosine``; ``distance``, as in the loss but without weight and focus; ``power``: mean square of the target,
    ``|t|^2 / r``.
    """

    loss: Tensor
    cosine: Tensor
    distance: Tensor
    power: Tensor


@dataclass(frozen=True)
class Since:
    """What changes are counted from: for each of N places another place, of the same layer or another, and its target.

    ``project``: that layer's map to the space of the targets; by default the one of the layer itself.
    """

    states_Md: Tensor
    place_N: Tensor
    target_Nr: Tensor
    project: Project | None = None


class _Side(NamedTuple):
    """How one of two states is found and what it is compared with."""

    states_Md: Tensor
    place_N: Tensor
    target_Nr: Tensor

    def gathered(self, part: slice) -> tuple[Tensor, Tensor]:
        states_nd = self.states_Md.index_select(0, self.place_N[part])
        return states_nd, self.target_Nr[part].to(states_nd.device, non_blocking=True)


class _StateTerm(torch.autograd.Function):
    """``tensors``: states, places and targets of the supervised places, and again of what their changes are counted from
    if that is what is compared. ``projects`` has one map for each."""

    @staticmethod
    def forward(
        ctx,
        weights_N: Tensor,
        focus: Tensor | None,
        distance: Distance,
        projects: tuple[Project | None, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weights_N, focus, *tensors)
        ctx.distance, ctx.projects = distance, projects
        ctx.one_tensor = len(tensors) > 3 and tensors[0] is tensors[3]  # changes over positions
        ctx.set_materialize_grads(False)
        sides = _sides(tensors)
        loss, cosine, total, power = (weights_N.new_zeros(()) for _ in range(4))
        for part in _slices(len(weights_N), tensors[0].shape[1]):
            states, targets = zip(*(side.gathered(part) for side in sides), strict=True)
            own_nr, target_nr = _compared(states, projects), _compared(targets)
            distance_n = distance(own_nr, target_nr)
            loss = loss + (weights_N[part] * _focused(distance_n, focus)).sum()
            counts_n = (weights_N[part] != 0).to(weights_N.dtype)
            cosine = cosine + cosine_similarity(own_nr, target_nr).to(counts_n.dtype) @ counts_n
            total = total + distance_n.to(counts_n.dtype) @ counts_n
            power = power + target_nr.to(counts_n.dtype).pow(2).mean(1) @ counts_n
        ctx.mark_non_differentiable(cosine, total, power)
        return loss, cosine, total, power

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, *_) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[4::3]
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_loss is None:
            return tuple(gradients)
        weights_N, focus, *tensors = ctx.saved_tensors
        sides = _sides(tensors)
        buffers = [torch.zeros_like(s.states_Md) if needs else None for s, needs in zip(sides, needed, strict=True)]
        if ctx.one_tensor:
            buffers[1] = buffers[0]  # and one gradient
        for part in _slices(len(weights_N), tensors[0].shape[1]):
            states, targets = zip(*(side.gathered(part) for side in sides), strict=True)
            states = tuple(x.detach().requires_grad_(needs) for x, needs in zip(states, needed, strict=True))
            with torch.enable_grad(), torch.autocast(states[0].device.type, enabled=False):
                distance_n = ctx.distance(_compared(states, ctx.projects), _compared(targets))
                value = (weights_N[part] * _focused(distance_n, focus)).sum()
                # A loss scale belongs before the gradient is rounded to the states' dtype.
                inputs = [x for x in states if x.requires_grad]
                slices = iter(torch.autograd.grad(value, inputs, grad_loss.to(value.dtype)))
            for side, buffer in zip(sides, buffers, strict=True):
                if buffer is not None:
                    buffer.index_add_(0, side.place_N[part], next(slices))
        for index, buffer in enumerate(buffers):
            gradients[4 + 3 * index] = None if index and ctx.one_tensor else buffer
        return tuple(gradients)


def _sides(tensors: Sequence[Tensor]) -> list[_Side]:
    return [_Side(*tensors[start : start + 3]) for start in range(0, len(tensors), 3)]


def _compared(parts: tuple[Tensor, ...], projects: tuple[Project | None, ...] = (None, None)) -> Tensor:
    """A point, or the difference of two, in float32 so that half precision cancels no more than it has to."""
    mapped = [x if project is None else project(x) for x, project in zip(parts, projects, strict=False)]
    if len(mapped) == 1:
        return mapped[0]
    to, since = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in mapped)
    return to - since


def _focused(distance_n: Tensor, focus: Tensor | None) -> Tensor:
    if focus is None:
        return distance_n
    least = torch.finfo(focus.dtype).tiny
    return distance_n * (distance_n.detach() / focus.clamp(min=least)).clamp(max=FOCUS_LIMIT)


def _slices(positions: int, width: int) -> list[slice]:
    size = max(SLICE_BYTES // (4 * width), 1)
    return [slice(start, start + size) for start in range(0, positions, size)]


def state_term(
    states_Md: Tensor,
    place_N: Tensor,
    target_Nr: Tensor,
    weights_N: Tensor,
    kind: str = "mse",
    project: Project | None = None,
    *,
    focus: Tensor | None = None,
) -> StateSums:
    """``sum_n weight_n * f_n * d_n`` with ``d_n = d(project(states[place_n]), target_n)``, and the sums behind averages.

    Args:
        states_Md: all states of a layer.
        place_N: the supervised ones, each once.
        target_Nr: what they are compared with; on any device (pinned main memory, say), without gradient.
        weights_N: float32.
        kind: as in `representation_distance`.
        project: a frozen map to the space of the targets; it is called again in backward.
        focus: a scalar, the usual distance of this layer (a running mean, say). Then ``f_n = min(d_n / focus, 4)``, a
            constant for the gradient, so that positions count more the further apart student and teacher are there. By
            default ``f_n = 1``. Do not change it in place before backward.

    Returns:
        Four scalars, float32. Without positions 0, with a live graph.
    """
    distance = partial(representation_distance, kind=kind)
    return StateSums(*_StateTerm.apply(weights_N, focus, distance, (project,), states_Md, place_N, target_Nr))


def transition_term(
    states_Md: Tensor,
    place_N: Tensor,
    target_Nr: Tensor,
    weights_N: Tensor,
    since: Since,
    project: Project | None = None,
    *,
    focus: Tensor | None = None,
) -> StateSums:
    """`state_term` for changes (arXiv 2606.29340): ``d_n = 1 - cos(own_n, other_n)``, where ``own_n = project(states[place_n])
    - project(since.states[since.place_n])`` and ``other_n = target_n - since.target_n``. Gradients reach both states.

    Over positions ``since`` has the same states and the place before: with N supervised places, pass ``place_N[1:]``,
    ``target_Nr[1:]``, ``Since(states_Md, place_N[:-1], target_Nr[:-1])``, which copies nothing, and weights that are 0
    where `previous_positions` is -1. Over layers it has a lower layer's states, places, targets and map.

    A place may be supervised once and be counted from once. A change of length 0 has no gradient, see `transition_distance`.

    Raises:
        ValueError: not as many places and targets to count from as there are changes.
    """
    if not len(place_N) == len(since.place_N) == len(since.target_Nr):
        raise ValueError(
            f"{len(place_N)} places change, and {len(since.place_N)} places and {len(since.target_Nr)} targets are what "
            "that is counted from. Give one of each for every change."
        )
    projects = (project, since.project or project)
    return StateSums(
        *_StateTerm.apply(
            weights_N,
            focus,
            transition_distance,
            projects,
            *(states_Md, place_N, target_Nr),
            *(since.states_Md, since.place_N, since.target_Nr),
        )
    )
