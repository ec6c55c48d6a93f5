"""`BridgeFitter`: from streams of paired states to a bridge, in one pass and in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oprd.bridge.bridge import Bridge
from oprd.bridge.moments import Moments
from oprd.bridge.report import Sample, build_report, cosine_by_rank
from oprd.bridge.solve import LayerSolution, principal_directions, solve, theorem_rank

RIDGE = 1e-8  # relative: enough to keep a float64 factorisation alive, too little to bend a map


class BridgeFitter:
    """Collects second moments of paired states per layer pair and solves Eq. 12 and 13 for every rank at once.

    The result does not depend on how rows are chunked, ordered or spread over fitters that are merged. Rows given with
    ``held_out=True`` take no part in the fit; they choose between settings and fill the report.

    Args:
        layer_map: teacher layer of each student layer, from 1 (`oprd.objectives.map_layers`).
        student_dim, teacher_dim: widths.
        device: where sums are kept and solved. Float64 throughout.
    """

    def __init__(
        self, layer_map: Sequence[int], student_dim: int, teacher_dim: int, *, device: torch.device | str = "cpu"
    ) -> None:
        self.layer_map = list(layer_map)
        self.dims = (student_dim, teacher_dim)
        self.train = [Moments.empty(student_dim, teacher_dim, device) for _ in self.layer_map]
        self.held_out: list[Moments] | None = None
        self.sample = Sample()
        self.device = device

    @property
    def count(self) -> int:
        """Rows that the fit rests on."""
        return self.train[0].count

    def _check(self, states: Tensor | Sequence[Tensor], side: str, width: int) -> None:
        if len(states) != len(self.layer_map):
            raise ValueError(f"{side} has {len(states)} layers, the layer map {len(self.layer_map)}.")
        for layer, rows in enumerate(states, 1):
            if rows.ndim != 2 or rows.shape[1] != width:
                raise ValueError(
                    f"{side}, layer {layer}: expected [n, {width}], got {list(rows.shape)}. States are [layers, n, d]."
                )
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(
                    f"{side}, layer {layer}: states hold NaN or infinity; one such row would spoil the sums."
                )

    def update(
        self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], *, held_out: bool = False
    ) -> None:
        """Add n paired rows of every layer: ``[layers, n, d_S]`` and ``[layers, n, d_T]``, the teacher's at the layers of
        the map. Lists of ``[n, d]`` do as well.

        Raises:
            ValueError: other shapes, unequal numbers of rows, or values that are not finite.
        """
        for states, side, width in ((student, "student", self.dims[0]), (teacher, "teacher", self.dims[1])):
            self._check(states, side, width)
        if len({len(rows) for rows in (*student, *teacher)}) > 1:
            raise ValueError("student and teacher have different numbers of rows, or their layers do; rows are pairs.")
        if len(student[0]) == 0:
            return
        if held_out and self.held_out is None:
            self.held_out = [Moments.empty(*self.dims, self.device) for _ in self.layer_map]
        for moments, own, other in zip(self.held_out if held_out else self.train, student, teacher, strict=True):
            moments.update(own, other)
        if held_out:
            self.sample.add(student, teacher)

    def merge(self, other: BridgeFitter) -> None:
        """Add what another fitter has seen, in another process or on other prompts."""
        if other.layer_map != self.layer_map or other.dims != self.dims:
            raise ValueError("Only fitters of the same layer map and widths can be merged.")
        for mine, theirs in zip(self.train, other.train, strict=True):
            mine.merge(theirs)
        if other.held_out is not None:
            if self.held_out is None:
                self.held_out = [Moments.empty(*self.dims, self.device) for _ in self.layer_map]
            for mine, theirs in zip(self.held_out, other.held_out, strict=True):
                mine.merge(theirs)
            self.sample.merge(other.sample)

    def solutions(self, *, ridge: float, intercept: bool, principal: list | None = None) -> list[LayerSolution]:
        """All layers, all ranks."""
        principal = principal or [principal_directions(moments) for moments in self.train]
        return [
            solve(moments, ridge=ridge, intercept=intercept, principal=directions)
            for moments, directions in zip(self.train, principal, strict=True)
        ]

    def _explained(self, solutions: list[LayerSolution]) -> list[Tensor]:
        moments = self.held_out or self.train
        return [solution.r_squared(rows) for solution, rows in zip(solutions, moments, strict=True)]

    def fit(
        self,
        rank: str | int = "auto",
        ridge: float = RIDGE,
        *,
        intercept: bool | None = None,
        facts: dict[str, Any] | None = None,
    ) -> Bridge:
        """Solve, choose and report.

        Args:
            rank: a number, ``full`` (the narrower width), or ``auto``: Theorem 3's rule and, where rows were held out,
                the rank of the highest held-out cosine; ``report["rank"]`` has both and says which was taken.
            ridge: relative to the mean student variance.
            intercept: None tries both and keeps the one that explains more held-out variance (more training variance
                where nothing was held out, which the intercept cannot lose).
            facts: goes into the report as it is (data, versions).

        Raises:
            ValueError: no rows, or a rank out of range.
        """
        highest = min(self.dims)
        if self.count == 0:
            raise ValueError("The fitter has seen no rows. Call update first.")
        if not (rank in ("auto", "full") or (type(rank) is int and 1 <= rank <= highest)):
            raise ValueError(f"rank must be auto, full or 1..{highest}, got {rank!r}.")
        if not ridge >= 0:
            raise ValueError(f"ridge must be a number that is not negative, got {ridge!r}.")
        principal = [principal_directions(moments) for moments in self.train]
        tried = {
            choice: self.solutions(ridge=ridge, intercept=choice, principal=principal)
            for choice in ((True, False) if intercept is None else (intercept,))
        }
        weighted = {
            choice: sum(
                float((s.variance[:highest] * r[:highest]).sum() / s.variance.sum().clamp(min=1e-30))
                for s, r in zip(solutions, self._explained(solutions), strict=True)
            )
            / len(solutions)
            for choice, solutions in tried.items()
        }
        best = max(weighted, key=weighted.get)
        solutions = tried[best]
        explained = self._explained(solutions)
        chosen = {"theorem": theorem_rank([s.variance for s in solutions], explained, highest)}
        curve = cosine_by_rank(solutions, self.sample, highest) if len(self.sample) else {}
        if curve:
            chosen["held_out_cosine"] = max(curve, key=curve.get)
        taken = highest if rank == "full" else rank if rank != "auto" else chosen["theorem"]
        report = build_report(solutions, self.train, self.held_out, self.sample, highest)
        report["rank"] = {
            "taken": taken,
            "by": "theorem" if rank == "auto" else "request",
            **chosen,
        }
        report["fit"] = {
            "rows": self.count,
            "rows_held_out": self.held_out[0].count if self.held_out else 0,
            "ridge": ridge,
            "intercept": best,
            "variance_explained": {("with" if choice else "without"): value for choice, value in weighted.items()},
        }
        report |= facts or {}
        maps, directions = (
            torch.stack([getattr(solution, part)[:taken] for solution in solutions]).float()
            for part in ("student_map", "directions")
        )
        return Bridge(
            self.layer_map,
            maps,
            torch.stack([s.student_mean for s in solutions]).float() if best else None,
            directions,
            torch.stack([s.teacher_mean for s in solutions]).float(),
            report=report,
        )
