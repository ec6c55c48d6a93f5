"""What is logged of two next-token distributions besides the loss: entropies and the overlap of the top tokens.

They need a pass over the vocabulary that the loss does not, so they are taken at a sample of positions.

Shapes: N positions, M measured ones, m of a chunk, V vocabulary; ``...`` any leading shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd.objectives.projection import Projection, rows_that_fit

OVERLAP_K = 16
MEASURED_POSITIONS = 256  # of a micro-batch, at most


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, ``[..., V] -> [...]``."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    p = log_p.exp()
    return -torch.linalg.vecdot(p, log_p.clamp_(min=torch.finfo(log_p.dtype).min))  # 0 log 0 = 0


@torch.no_grad()
def top_k_overlap(student_logits: Tensor, teacher_logits: Tensor, k: int = OVERLAP_K) -> Tensor:
    """Share of the student's top-k tokens that are in the teacher's, ``[..., V]`` twice -> ``[...]`` in [0, 1]."""
    k = min(k, student_logits.shape[-1])
    student, teacher = (logits.topk(k, dim=-1).indices for logits in (student_logits, teacher_logits))
    return (student.unsqueeze(-1) == teacher.unsqueeze(-2)).any(-1).float().mean(-1)


def evenly_spaced(count: int, most: int, device: torch.device) -> Tensor:
    """Rising distinct indices of ``min(count, most)`` of ``count`` positions."""
    kept = min(count, most)
    return torch.arange(kept, device=device) * count // max(kept, 1)


@torch.no_grad()
def measured(
    student: Projection, teacher: Projection | None, student_Nd: Tensor, teacher_Nd: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over at most `MEASURED_POSITIONS` evenly spaced positions, and how many those are, each a float32 scalar.

    ``entropy/student``; with a ``teacher`` of the same vocabulary also ``entropy/teacher`` and ``overlap/top16``.
    """
    device = student_Nd.device
    at_M = evenly_spaced(len(student_Nd), MEASURED_POSITIONS, device)
    names = ["entropy/student"] if teacher is None else ["entropy/student", "entropy/teacher", "overlap/top16"]
    sums = {name: torch.zeros((), device=device) for name in names}
    for at_m in at_M.split(rows_that_fit(student.size * student.exact.itemsize, device)):
        own_mV = student.logits(student_Nd[at_m])
        sums["entropy/student"] += entropy(own_mV).sum()
        if teacher is not None:
            other_mV = teacher.logits(teacher_Nd[at_m])
            sums["entropy/teacher"] += entropy(other_mV).sum()
            sums["overlap/top16"] += top_k_overlap(own_mV, other_mV).sum()
    count = torch.tensor(float(len(at_M)), device=device)
    return {name: (total, count) for name, total in sums.items()}
