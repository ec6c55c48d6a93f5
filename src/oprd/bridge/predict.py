"""Before a run: will distilling through a bridge help, or lose more than the student lacks?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oprd.bridge.fit import BridgeFitter


def reverse_map(fitter: BridgeFitter, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares from the teacher's last states to the student's: ``h_S ~ A (h_T - mu_T) + mu_S``.

    Returns:
        ``A`` ``[d_S, d_T]``, ``mu_T``, ``mu_S``; float64.
    """
    moments = fitter.train[-1]
    gram, cross = moments.teacher_covariance(), moments.cross_covariance()
    gram = gram + ridge * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )
    return torch.linalg.lstsq(gram, cross.T).solution.T, moments.teacher_mean, moments.student_mean


@torch.no_grad()
def predict(
    fitter: BridgeFitter,
    student_logits: Callable[[Tensor], Tensor],
    teacher_logits: Callable[[Tensor], Tensor],
    agree: Callable[[Tensor, Tensor], Tensor],
    ridge: float = 1e-6,
) -> dict[str, float]:
    """How often the student's choice of token is the teacher's, read from its own states and from the teacher's states
    mapped into its space, on the held-out sample.

    A bridge ties the student to what a linear map can tell of the teacher. Where the second number is below the first, the
    map loses more than the student lacks, and the bridge will probably do harm.

    Args:
        student_logits, teacher_logits: from last hidden states ``[n, d]``.
        agree: student's and teacher's token ids ``[n]`` -> bool ``[n]``.
    """
    linear, teacher_mean, student_mean = reverse_map(fitter, ridge)
    own, other = fitter.sample.student[-1], fitter.sample.teacher[-1]
    mapped = (other.to(linear) - teacher_mean) @ linear.T + student_mean
    chosen = teacher_logits(other).argmax(-1)
    rates = {
        "student_agreement": agree(student_logits(own).argmax(-1), chosen),
        "mapped_teacher_agreement": agree(student_logits(mapped.to(own)).argmax(-1), chosen),
    }
    return {name: rate.float().mean().item() for name, rate in rates.items()} | {"rows": len(own)}
