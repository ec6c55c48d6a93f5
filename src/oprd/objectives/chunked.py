"""Output-space objectives over many positions without holding their logits.

Positions are projected a chunk at a time and the chunk is recomputed in the backward pass, so the transient is
``chunk x V`` on either side, however long the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OVERLAP_K = 16

Project = Callable[[Tensor], Tensor]  # [n, d] -> [n, V]
Log = dict[str, Tensor]  # unreduced [n] before, sums after; no gradient
PerPosition = Callable[..., tuple[Tensor, Log]]  # student logits, teacher logits, *row data -> cost [n] and what to log


class OutputTerms(NamedTuple):
    """Weighted sum of the objective, and unweighted sums over positions for the log."""

    loss: Tensor
    sums: Log


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, ``[..., V] -> [...]``."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


@torch.no_grad()
def top_k_overlap(student_logits: Tensor, teacher_logits: Tensor, k: int = OVERLAP_K) -> Tensor:
    """Share of the student's top-k tokens that are in the teacher's, ``[..., V]`` twice -> ``[...]`` in [0, 1]."""
    k = min(k, student_logits.shape[-1])
    student, teacher = (logits.topk(k, dim=-1).indices for logits in (student_logits, teacher_logits))
    return (student.unsqueeze(-1) == teacher.unsqueeze(-2)).any(-1).float().mean(-1)


def chunked_output_terms(
    per_position: PerPosition,
    student_Nd: Tensor,
    teacher_Nd: Tensor,
    rows: Sequence[Tensor],
    weights_N: Tensor,
    project_student: Project,
    project_teacher: Project,
    chunk_size: int = 1024,
) -> OutputTerms:
    """Sum of ``weight * per_position(student logits, teacher logits, *rows)`` over N positions.

    ``rows`` are tensors ``[N, ...]`` that go with each position (its sampled token, ...). ``N = 0`` gives 0 with a live
    graph, so a process without supervised positions still takes part in the backward.
    """

    def one_chunk(student_nd: Tensor, teacher_nd: Tensor, weights_n: Tensor, *rows_n: Tensor) -> tuple[Tensor, Log]:
        student_nV = project_student(student_nd)
        with torch.no_grad():
            teacher_nV = project_teacher(teacher_nd)
        values_n, log = per_position(student_nV, teacher_nV, *rows_n)
        loss = (weights_n * values_n).sum()
        # The log comes last: recomputation stops at the last tensor that backward needs.
        log = {"output_divergence": values_n, "entropy/student": entropy(student_nV), **log}
        return loss, {name: value.detach().float().sum() for name, value in log.items()}

    chunks = [
        checkpoint(
            one_chunk,
            *(tensor[start : start + chunk_size] for tensor in (student_Nd, teacher_Nd, weights_N, *rows)),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, max(len(weights_N), 1), chunk_size)
    ]
    losses, logs = zip(*chunks, strict=True)
    sums = {name: torch.stack([log[name] for log in logs]).sum() for name in logs[0]}
    return OutputTerms(torch.stack(losses).sum(), sums)
