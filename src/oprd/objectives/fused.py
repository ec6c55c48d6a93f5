"""Next-token losses whose gradients are computed with the loss: no logits outlive a chunk, nothing is recomputed.

Positions are projected a chunk at a time. A chunk's cost and its gradient by the logits are formed at once and folded into
gradients of the states ``[N, d]`` and of the head ``[V, d]`` (one buffer, float32), as Liger does; backward only scales
them. So the transient is a few ``[n, V]`` copies, of `projection.COPY_BYTES` at most each, however long the batch, and the
student's head is multiplied three times (once forward, twice for gradients; once less where it is frozen).

Shapes: N positions, n of a chunk, V vocabulary (V_T the teacher's), d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oprd.objectives.output_space import SelectedCost, log_probabilities
from oprd.objectives.projection import Projection, rows_that_fit

Log = dict[str, Tensor]  # unreduced [n] in a chunk, sums over positions after; no gradient
TeacherLogits = Callable[[], Tensor]  # formed when asked for, so that they need not outlive their use
PerPosition = Callable[..., tuple[Tensor, Log]]  # student logits, teacher logits, *rows -> cost [n] and what to log


class ChunkTerms(NamedTuple):
    """Cost ``[n]``, its gradient by the student's logits ``[n, V]`` (None if unwanted), and what to log, each ``[n]``."""

    cost: Tensor
    gradient: Tensor | None
    log: Log


Kernel = Callable[..., ChunkTerms]  # student logits [n, V], TeacherLogits, wants gradient, *rows [n, ...]


class OutputTerms(NamedTuple):
    """Weighted sum of the objective, and unweighted sums over positions for the log."""

    loss: Tensor
    sums: Log


class _WithGradients(torch.autograd.Function):
    """A value whose gradients by some tensors are known."""

    @staticmethod
    def forward(ctx, value: Tensor, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        # In place: a second [V, d] would be the largest tensor of the backward. Autograd refuses a second backward.
        gradients = [None if g is None else g.mul_(grad) for g in ctx.saved_tensors]
        return None, None, *gradients, *(None,) * len(gradients)


class HeadGradients:
    """Where gradients by a student's states and head are gathered; only what needs them has a buffer."""

    def __init__(self, head: Projection, states_Nd: Tensor) -> None:
        self.inputs = (states_Nd, head.weight_Vd, head.bias_V)
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in self.inputs]
        exact = [x.dtype if x is states_Nd else head.exact for x in self.inputs if x is not None] + [head.exact]
        self.states_Nd, self.weight_Vd, self.bias_V = (
            torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if want else None
            for x, want, dtype in zip(self.inputs, wanted, exact, strict=False)
        )
        self.wanted = any(wanted)

    def attach(self, loss: Tensor) -> Tensor:
        """The loss with these gradients."""
        if not self.wanted:
            return loss
        gradients = [
            None if g is None else g.to(x.dtype)
            for g, x in zip((self.states_Nd, self.weight_Vd, self.bias_V), self.inputs, strict=True)
        ]
        return _WithGradients.apply(loss, len(gradients), *self.inputs, *gradients)

    def add(self, part: slice, gradient_nV: Tensor, weights_n: Tensor, states_nd: Tensor, cast: Projection) -> None:
        """Gradients of ``sum_n weight_n * cost_n``, given those of the costs by ``W h + b``.

        The weights scale ``[n, d]`` rather than ``[n, V]``, which is a pass less and does not underflow in half precision.
        """
        dtype, scale_n1 = cast.dtype, weights_n.unsqueeze(1)
        half = gradient_nV.to(dtype) if dtype != cast.exact else gradient_nV
        on_device = half.is_cuda and half is not gradient_nV  # products of half precision, not rounded to it
        if self.states_Nd is not None:
            if on_device:
                states_grad_nd = torch.mm(half, cast.weight_Vd, out_dtype=cast.exact)
            else:
                states_grad_nd = (half @ cast.weight_Vd).to(cast.exact)
            self.states_Nd[part] = states_grad_nd.mul_(scale_n1).to(self.states_Nd.dtype)
        if self.weight_Vd is not None:
            scaled_nd = states_nd.to(cast.exact) * scale_n1
            if on_device:
                torch.addmm(self.weight_Vd, half.T, scaled_nd.to(dtype), out_dtype=cast.exact, out=self.weight_Vd)
            else:
                self.weight_Vd.addmm_(gradient_nV.T, scaled_nd)
        if self.bias_V is not None:
            self.bias_V.addmv_(gradient_nV.T, weights_n)

    def add_at(self, part: slice, tokens_nK: Tensor, slope_nK: Tensor, rows_nKd: Tensor, states_nd: Tensor) -> None:
        """Gradients of a loss, given those by ``W h + b`` at a few tokens of each position. ``rows_nKd`` is overwritten."""
        if self.states_Nd is not None:
            states_grad_nd = torch.bmm(slope_nK.unsqueeze(1), rows_nKd).squeeze(1)
            self.states_Nd[part] = states_grad_nd.to(self.states_Nd.dtype)
        if self.weight_Vd is not None:
            torch.mul(slope_nK.unsqueeze(2), states_nd.to(rows_nKd.dtype).unsqueeze(1), out=rows_nKd)
            self.weight_Vd.index_add_(0, tokens_nK.flatten(), rows_nKd.flatten(0, 1))
        if self.bias_V is not None:
            self.bias_V.index_add_(0, tokens_nK.flatten(), slope_nK.flatten())


def fused_terms(
    kernel: Kernel,
    student: Projection,
    teacher: Projection,
    student_Nd: Tensor,
    teacher_Nd: Tensor,
    rows: Sequence[Tensor],
    weights_N: Tensor,
    row_bytes: int = 0,
) -> OutputTerms:
    """Sum of ``weight * cost`` over N positions, with gradients to the student's states, head and bias if they need them.

    Args:
        kernel: cost and gradient of a chunk, from `full_kernel`, `selected_kernel` or `differentiated`.
        student_Nd, teacher_Nd: states ``[N, d_S]``, ``[N, d_T]``; the teacher's get no gradient.
        rows: tensors ``[N, ...]`` that go with each position (its sampled token, ...).
        row_bytes: what the kernel's largest tensor takes for one position, where that is more than a row of logits.

    Returns:
        A float32 (or wider) scalar and the sums. ``N = 0`` gives 0 with a live graph, so a process without supervised
        positions still takes part in the backward. The graph can be walked once.
    """
    gradients = HeadGradients(student, student_Nd)
    with torch.no_grad(), torch.autocast(student_Nd.device.type, enabled=False):
        own, other = student.cast(), teacher.cast()
        weights_N = weights_N.to(own.exact)
        row_bytes = max(row_bytes, max(own.size, other.size) * own.exact.itemsize)
        length = rows_that_fit(row_bytes, student_Nd.device)
        loss = weights_N.new_zeros(())
        logs: list[Log] = []
        for start in range(0, max(len(weights_N), 1), length):
            part = slice(start, start + length)
            states_nd, other_nd, weights_n = student_Nd[part].detach(), teacher_Nd[part], weights_N[part]
            student_nV = own.logits(states_nd)
            terms = kernel(
                student_nV, lambda s=other_nd: other.logits(s), gradients.wanted, *(row[part] for row in rows)
            )
            loss += (weights_n * terms.cost).sum()
            log = {"output_divergence": terms.cost, **terms.log}
            logs.append({name: value.float().sum() for name, value in log.items()})
            if terms.gradient is not None:
                gradient_nV = own.uncap_(terms.gradient, student_nV)
                gradients.add(part, gradient_nV, weights_n * own.factor, states_nd, own)
            del student_nV, terms  # else they would live on while the next chunk is projected
        sums = {name: torch.stack([log[name] for log in logs]).sum() for name in logs[0]}
    return OutputTerms(gradients.attach(loss), sums)


def full_kernel(student_nV: Tensor, teacher: TeacherLogits, wants_gradient: bool, *_: Tensor) -> ChunkTerms:
    """Eq. 4: ``KL = sum_v p_v r_v`` with ``r = log p - log q``; its gradient by the logits is ``p (r - KL)``. Finite
    logits."""
    ratio_nV, log_p_nV = log_probabilities(teacher()), log_probabilities(student_nV)
    torch.sub(log_p_nV, ratio_nV, out=ratio_nV)
    p_nV = log_p_nV.exp_()
    cost_n = torch.linalg.vecdot(p_nV, ratio_nV)
    gradient = ratio_nV.sub_(cost_n.unsqueeze(1)).mul_(p_nV) if wants_gradient else None
    return ChunkTerms(cost_n, gradient, {})


def selected_kernel(select: Callable[..., tuple[Tensor, SelectedCost]]) -> Kernel:
    """Costs of the log-probabilities of a few tokens of each position.

    ``select(log p [n, V], log q [n, V], *rows)`` gives token ids ``[n, K]`` (repetitions allowed) and the cost ``[n]`` as a
    function of both sides' log-probabilities there. With ``a_k`` its derivatives by ``log p``, the gradient by the
    logits is ``sum_k a_k (1[v = token_k] - p_v)``.
    """

    def kernel(student_nV: Tensor, teacher: TeacherLogits, wants_gradient: bool, *rows: Tensor) -> ChunkTerms:
        log_q_nV, log_p_nV = log_probabilities(teacher()), log_probabilities(student_nV)
        tokens_nK, cost_of = select(log_p_nV, log_q_nV, *rows)
        log_p_nK, log_q_nK = log_p_nV.gather(1, tokens_nK), log_q_nV.gather(1, tokens_nK)
        del log_q_nV
        cost_n, slope_nK = value_and_slope(cost_of, log_p_nK, log_q_nK, wants_gradient)
        if not wants_gradient:
            return ChunkTerms(cost_n, None, {})
        gradient_nV = log_p_nV.exp_().mul_(-slope_nK.sum(1, keepdim=True))
        return ChunkTerms(cost_n, gradient_nV.scatter_add_(1, tokens_nK, slope_nK), {})

    return kernel


def differentiated(per_position: PerPosition) -> Kernel:
    """The kernel of any cost, by differentiating it on a chunk's logits."""

    def kernel(student_nV: Tensor, teacher: TeacherLogits, wants_gradient: bool, *rows: Tensor) -> ChunkTerms:
        logits_nV = student_nV.detach().requires_grad_(wants_gradient)
        with torch.set_grad_enabled(wants_gradient):
            cost_n, log = per_position(logits_nV, teacher(), *rows)
            gradient = torch.autograd.grad(cost_n.sum(), logits_nV)[0] if wants_gradient else None
        return ChunkTerms(cost_n.detach(), gradient, {name: value.detach() for name, value in log.items()})

    return kernel


def value_and_slope(
    cost_of: SelectedCost, own_nK: Tensor, other_nK: Tensor, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """A cost of a few numbers of each position ``[n, K]`` and its derivative by the student's."""
    with torch.set_grad_enabled(wants):
        own_nK = own_nK.detach().requires_grad_(wants)
        cost_n = cost_of(own_nK, other_nK)
        return cost_n.detach(), torch.autograd.grad(cost_n.sum(), own_nK)[0] if wants else None
