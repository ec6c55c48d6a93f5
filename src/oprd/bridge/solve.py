"""The bridge in closed form, for every rank at once, and what its second moments say about it (Eq. 12, 13; Theorem 3).

Shapes: d_S and d_T widths, R = d_T teacher directions in falling order of variance. A rank is a slice of the first r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oprd.bridge.moments import Moments


@dataclass(frozen=True)
class LayerSolution:
    """One layer pair, all ranks, float64.

    ``directions`` ``[R, d_T]`` and ``teacher_mean``: Eq. 12. ``student_map`` ``[R, d_S]``: Eq. 13's minimiser, row i for
    direction i. ``student_mean`` ``[d_S]`` where the map has an intercept, else None. ``variance`` ``[R]``: lambda_i.
    """

    directions: Tensor
    teacher_mean: Tensor
    student_map: Tensor
    student_mean: Tensor | None
    variance: Tensor

    def residual(self, moments: Moments) -> Tensor:
        """Mean squared error per direction ``[R]`` on the rows behind ``moments``, which may be others than the fit's."""
        offset = self.teacher_mean  # targets are P_T (h_T - mu_T) with the fit's mean, whatever these rows' own mean is
        target = moments.teacher_teacher / moments.count
        target = target - torch.outer(moments.teacher_mean, offset) - torch.outer(offset, moments.teacher_mean)
        target = target + torch.outer(offset, offset)
        gram, cross = moments.student_student / moments.count, moments.student_teacher / moments.count
        cross = cross - torch.outer(moments.student_mean, offset)
        if self.student_mean is not None:
            shift = self.student_mean
            gram = gram - torch.outer(moments.student_mean, shift) - torch.outer(shift, moments.student_mean)
            gram = gram + torch.outer(shift, shift)
            cross = cross - torch.outer(shift, moments.teacher_mean - offset)
        energy = ((self.directions @ target) * self.directions).sum(1)
        agreement = ((self.student_map @ cross) * self.directions).sum(1)
        fitted = ((self.student_map @ gram) * self.student_map).sum(1)
        return (energy - 2 * agreement + fitted).clamp(min=0)

    def r_squared(self, moments: Moments) -> Tensor:
        """Share of each direction's variance that the student explains, ``[R]``; below 0 where it does harm."""
        variance = ((self.directions @ moments.teacher_covariance()) * self.directions).sum(1)
        residual, tiny = self.residual(moments), self.variance.max() * 1e-14
        return torch.where(variance > tiny, 1 - residual / variance.clamp(min=tiny), 0.0)


def principal_directions(moments: Moments) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the teacher's covariance as rows ``[d_T, d_T]`` and their variances, falling (Eq. 12).

    Each direction's sign is fixed (its largest entry is positive), so that a fit can be compared with another.
    """
    variance, vectors = torch.linalg.eigh(moments.teacher_covariance())
    variance, directions = variance.flip(0).clamp(min=0), vectors.flip(1).T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0), variance


def solve(
    moments: Moments, *, ridge: float, intercept: bool, principal: tuple[Tensor, Tensor] | None = None
) -> LayerSolution:
    """The minimiser of ``mean ||P_S h_S - P_T (h_T - mu_T)||^2 + ridge * s * ||P_S||^2``, s the mean student variance.

    Args:
        ridge: relative to the mean of the regression's diagonal, so that it means the same at any scale.
        intercept: regress on ``h_S - mu_S`` (the same as a constant beside P_S).
        principal: directions and variances, where they are known already.
    """
    directions, variance = principal or principal_directions(moments)
    gram = moments.student_gram(centred=intercept)
    gram = gram + ridge * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )
    cross = moments.cross_covariance() @ directions.T
    noise = 1e-13 * float(moments.student_gram(centred=False).diagonal().mean())  # smaller pivots are rounding
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed) == 0 and float(factor.diagonal().square().min()) > noise:
        student_map = torch.cholesky_solve(cross, factor).T
    else:  # rank-deficient rows and no ridge: the minimiser of least norm
        student_map = (torch.linalg.pinv(gram, atol=noise, rtol=0.0, hermitian=True) @ cross).T
    return LayerSolution(
        directions, moments.teacher_mean, student_map, moments.student_mean if intercept else None, variance
    )


def theorem_rank(variances: list[Tensor], r_squared: list[Tensor], highest: int) -> int:
    """Theorem 3's best rank, one for all layers: the r that minimises
    ``sum_{i>r} lambda_i rho_i^2 + sum_{i<=r} lambda_i (1 - rho_i^2)``, each layer relative to its total variance.

    Where rho^2 falls with i, this is where it crosses 1/2.
    """
    total = 0
    for variance, explained in zip(variances, r_squared, strict=True):
        rho = explained[:highest].clamp(0, 1)
        share = variance[:highest] / variance.sum().clamp(min=1e-30)
        total = total + torch.cumsum(share * (1 - 2 * rho), 0)  # error(r) up to a constant that has no r in it
    return int(total.argmin()) + 1
