"""Streaming second moments of paired states: everything that a linear bridge can know about its data.

Shapes: n rows, d_S and d_T widths. Memory is ``(d_S + d_T)^2`` numbers a layer pair, however many rows come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Raw sums in float64: ``n``, sums of either side, and the three product sums ``S'S``, ``S'T``, ``T'T``.

    Sums add up, so chunking, order and the number of processes change rounding in the last digits and nothing else.
    """

    count: int
    student_sum: Tensor
    teacher_sum: Tensor
    student_student: Tensor
    student_teacher: Tensor
    teacher_teacher: Tensor

    @classmethod
    def empty(cls, student_dim: int, teacher_dim: int, device: torch.device | str = "cpu") -> Moments:
        """No rows yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(
            0,
            zeros(student_dim),
            zeros(teacher_dim),
            zeros(student_dim, student_dim),
            zeros(student_dim, teacher_dim),
            zeros(teacher_dim, teacher_dim),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, as they are saved and reduced over processes."""
        names = ("student_sum", "teacher_sum", "student_student", "student_teacher", "teacher_teacher")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def update(self, student_nd: Tensor, teacher_nd: Tensor) -> None:
        """Add paired rows ``[n, d_S]`` and ``[n, d_T]``, of any dtype, summed in float64."""
        student, teacher = (rows.to(self.student_sum.device, torch.float64) for rows in (student_nd, teacher_nd))
        self.count += len(student)
        self.student_sum += student.sum(0)
        self.teacher_sum += teacher.sum(0)
        self.student_student.addmm_(student.T, student)
        self.student_teacher.addmm_(student.T, teacher)
        self.teacher_teacher.addmm_(teacher.T, teacher)

    def merge(self, other: Moments) -> None:
        """Add what another fitter or process has seen."""
        self.count += other.count
        for name, mine in self.tensors().items():
            mine += getattr(other, name).to(mine.device)

    @property
    def student_mean(self) -> Tensor:
        """``[d_S]``."""
        return self.student_sum / self.count

    @property
    def teacher_mean(self) -> Tensor:
        """``[d_T]``."""
        return self.teacher_sum / self.count

    def teacher_covariance(self) -> Tensor:
        """``[d_T, d_T]``, around the mean (Eq. 12)."""
        mean = self.teacher_mean
        return self.teacher_teacher / self.count - torch.outer(mean, mean)

    def student_gram(self, *, centred: bool) -> Tensor:
        """``[d_S, d_S]``: the second moment that the regression inverts, around the mean or around 0."""
        gram = self.student_student / self.count
        return gram - torch.outer(self.student_mean, self.student_mean) if centred else gram

    def cross_covariance(self) -> Tensor:
        """``[d_S, d_T]``: ``E[h_S (h_T - mu_T)']``; centring the student as well would change nothing."""
        return self.student_teacher / self.count - torch.outer(self.student_mean, self.teacher_mean)
