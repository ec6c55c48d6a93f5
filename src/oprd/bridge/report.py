"""What a fitted bridge is worth: cosine against rank, R^2 per direction, and what remains without the largest ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oprd.bridge.moments import Moments
from oprd.bridge.solve import LayerSolution

SAMPLE_ROWS = 1024  # held-out rows kept, whatever their number: cosines need rows, not moments
SHOWN = 64  # directions listed one by one
TAKEN_OUT = (1, 2, 4)  # directions of largest variance, where massive activations live


class Sample:
    """A uniform sample of held-out pairs, all layers of a row together. Mergeable; memory is fixed."""

    def __init__(self, rows: int = SAMPLE_ROWS, seed: int = 0) -> None:
        self.rows = rows
        self._generator = torch.Generator().manual_seed(seed)
        self.keys = torch.zeros(0)
        self.student: list[Tensor] = []
        self.teacher: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.keys)

    @torch.no_grad()
    def add(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """Offer paired rows, per layer ``[n, d]``."""
        self._take(torch.rand(len(student[0]), generator=self._generator), student, teacher)

    def merge(self, other: Sample) -> None:
        """Offer the rows that another sample kept."""
        if len(other):
            self._take(other.keys, other.student, other.teacher)

    def _take(self, keys: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        everything = torch.cat([self.keys, keys])
        kept = everything.argsort()[: self.rows]

        def join(own: list[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
            own = own or [rows.new_zeros(0, rows.shape[1]).float().cpu() for rows in new]
            return [torch.cat([a, b.float().cpu()])[kept] for a, b in zip(own, new, strict=True)]

        self.student, self.teacher = join(self.student, student), join(self.teacher, teacher)
        self.keys = everything[kept]


def ranks_up_to(highest: int) -> list[int]:
    """1, 2, 4, ... and the highest itself."""
    return [*(2**power for power in range((highest - 1).bit_length())), highest]


def _projected(solution: LayerSolution, student_nd: Tensor, teacher_nd: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = (rows.to(solution.directions) for rows in (student_nd, teacher_nd))
    if solution.student_mean is not None:
        student = student - solution.student_mean
    return student @ solution.student_map.T, (teacher - solution.teacher_mean) @ solution.directions.T


def _cosines(student_nR: Tensor, teacher_nR: Tensor, ranks: Sequence[int], first: int = 0) -> list[float]:
    """Mean cosine over rows of directions ``first..r`` for every r, without a pass per rank."""
    own, other = student_nR[:, first:], teacher_nR[:, first:]
    products, own_2, other_2 = ((a * b).cumsum(1) for a, b in ((own, other), (own, own), (other, other)))
    columns = torch.tensor([rank - first - 1 for rank in ranks])
    cosine = products[:, columns] / (own_2[:, columns] * other_2[:, columns]).sqrt().clamp(min=1e-30)
    return cosine.mean(0).tolist()


def cosine_by_rank(solutions: Sequence[LayerSolution], sample: Sample, highest: int) -> dict[int, float]:
    """Held-out cosine in the bridge against rank, mean over layers (Fig. 12)."""
    ranks = ranks_up_to(highest)
    layers = [
        _cosines(*_projected(s, own, other), ranks)
        for s, own, other in zip(solutions, sample.student, sample.teacher, strict=True)
    ]
    return dict(zip(ranks, torch.tensor(layers).mean(0).tolist(), strict=True))


def layer_scores(solution: LayerSolution, held_out: Moments, sample: Sample, index: int, rank: int) -> dict[str, float]:
    """Held-out cosine and share of variance explained by the first ``rank`` directions, for the layer at ``index``."""
    rank = min(rank, len(solution.variance))
    share = solution.variance[:rank] / solution.variance[:rank].sum().clamp(min=1e-30)
    projected = _projected(solution, sample.student[index], sample.teacher[index])
    return {
        "cosine": _cosines(*projected, [rank])[0],
        "explained": float((share * solution.r_squared(held_out)[:rank]).sum()),
    }


def build_report(
    solutions: Sequence[LayerSolution],
    train: Sequence[Moments],
    held_out: Sequence[Moments] | None,
    sample: Sample,
    highest: int,
) -> dict[str, Any]:
    """JSON values: per layer, variance share and R^2 of the first directions; over layers, curves against rank.

    ``cosine.before`` is a random student map of the fitted one's row norms, ``cosine.after`` the fitted one, both on
    held-out rows; ``cosine.without_first_m`` leaves the m directions of largest variance out on both sides.
    """
    ranks = ranks_up_to(highest)
    layers, explained = [], {"train": [], "held_out": []}
    for index, solution in enumerate(solutions):
        r2 = {"train": solution.r_squared(train[index])}
        if held_out:
            r2["held_out"] = solution.r_squared(held_out[index])
        share = solution.variance / solution.variance.sum().clamp(min=1e-30)
        entry = {"layer": index + 1, "variance": share[:SHOWN].tolist()}
        for name, values in r2.items():
            entry[f"r2_{name}"] = values[:SHOWN].tolist()
            energy = share.cumsum(0).clamp(min=1e-30)
            weighted = (share * values).cumsum(0) / energy
            explained[name].append([float(weighted[rank - 1]) for rank in ranks])
        layers.append(entry)
    report: dict[str, Any] = {
        "layers": layers,
        "ranks": ranks,
        "explained": {name: torch.tensor(v).mean(0).tolist() for name, v in explained.items() if v},
    }
    if len(sample):
        report["cosine"] = _cosine_curves(solutions, sample, ranks)
    return report


def _cosine_curves(solutions: Sequence[LayerSolution], sample: Sample, ranks: list[int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    after, before = [], []
    without: dict[int, list[list[float]]] = {m: [] for m in TAKEN_OUT if m < ranks[-1]}
    for solution, own, other in zip(solutions, sample.student, sample.teacher, strict=True):
        projected = _projected(solution, own, other)
        after.append(_cosines(*projected, ranks))
        random = torch.randn(solution.student_map.shape, generator=generator, dtype=torch.float64)
        random = F.normalize(random, dim=1).to(solution.student_map) * solution.student_map.norm(dim=1, keepdim=True)
        start = own.to(random) - (solution.student_mean if solution.student_mean is not None else 0.0)
        before.append(_cosines(start @ random.T, projected[1], ranks))
        for taken in without:
            without[taken].append(_cosines(*projected, [rank for rank in ranks if rank > taken], taken))
    mean = {f"without_first_{m}": torch.tensor(rows).mean(0).tolist() for m, rows in without.items()}
    return {
        "rows": len(sample),
        "before": torch.tensor(before).mean(0).tolist(),
        "after": torch.tensor(after).mean(0).tolist(),
        "after_by_layer": after,
        **mean,
    }
