"""A layer's state loss that keeps nothing of its own until backward.

Written with plain operations, ``sum_n w_n d(s_n, t_n)`` keeps the gathered states and their difference in float32, N x d
for every layer, from forward to backward. Here backward gathers and compares again, a slice of positions at a time: what is
held is the layer's output, which the next block holds anyway, and the targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oprd.objectives.representation import cosine_similarity, representation_distance

SLICE_BYTES = 16 * 2**20  # of one float32 copy of a slice's states

Project = Callable[[Tensor], Tensor]  # states [n, d] -> [n, r]


class _StateTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        states_Md: Tensor,
        place_N: Tensor,
        target_Nr: Tensor,
        weights_N: Tensor,
        kind: str,
        project: Project | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states_Md, place_N, target_Nr, weights_N)
        ctx.kind, ctx.project = kind, project
        ctx.set_materialize_grads(False)
        loss, cosine = weights_N.new_zeros(()), weights_N.new_zeros(())
        for part in _slices(len(place_N), states_Md.shape[1]):
            own_nd = states_Md.index_select(0, place_N[part])
            target_nr = target_Nr[part].to(own_nd.device, non_blocking=True)
            own_nr = own_nd if project is None else project(own_nd)
            loss = loss + (weights_N[part] * representation_distance(own_nr, target_nr, kind)).sum()
            cosine = cosine + cosine_similarity(own_nr, target_nr).sum()
        ctx.mark_non_differentiable(cosine)
        return loss, cosine

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_loss is None:
            return (None,) * 6
        states_Md, place_N, target_Nr, weights_N = ctx.saved_tensors
        grad_Md = torch.zeros_like(states_Md)
        for part in _slices(len(place_N), states_Md.shape[1]):
            own_nd = states_Md.index_select(0, place_N[part]).detach().requires_grad_()
            target_nr = target_Nr[part].to(own_nd.device, non_blocking=True)
            with torch.enable_grad(), torch.autocast(own_nd.device.type, enabled=False):
                own_nr = own_nd if ctx.project is None else ctx.project(own_nd)
                value = (weights_N[part] * representation_distance(own_nr, target_nr, ctx.kind)).sum()
                # A loss scale belongs before the gradient is rounded to the states' dtype.
                (grad_nd,) = torch.autograd.grad(value, own_nd, grad_loss.to(value.dtype))
            grad_Md.index_copy_(0, place_N[part], grad_nd)
        return grad_Md, None, None, None, None, None


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
) -> tuple[Tensor, Tensor]:
    """``sum_n weight_n * d(project(states[place_n]), target_n)`` and the sum of cosines, which has no gradient.

    Args:
        states_Md: all states of a layer.
        place_N: the supervised ones, each once.
        target_Nr: what they are compared with; on any device (pinned main memory, say), without gradient.
        weights_N: float32.
        kind: as in `representation_distance`.
        project: a frozen map to the space of the targets; it is called again in backward.

    Returns:
        Two scalars, float32. Without positions 0, with a live graph.
    """
    return _StateTerm.apply(states_Md, place_N, target_Nr, weights_N, kind, project)
