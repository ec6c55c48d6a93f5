"""From graded answers to numbers with intervals. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oprd.evaluation.grading import Verdict
from oprd.evaluation.metrics import (
    PairedComparison,
    avg_per_problem,
    best_per_problem,
    bootstrap_interval,
    distinct_per_problem,
    paired_comparison,
    pass_per_problem,
)


@dataclass(frozen=True)
class Graded:
    """One answer to one problem: a line of ``responses.jsonl``."""

    problem: str
    index: int
    sample: int
    batch: int
    answer: str
    boxed: str | None
    verdict: str
    tokens: int
    cut_off: bool
    response: str

    def as_row(self) -> dict[str, Any]:
        """The line."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Outcome of k samples for each problem: ``answers[i][j]`` is sample j of problem i."""

    answers: tuple[tuple[Graded, ...], ...]

    @classmethod
    def of(cls, graded: Iterable[Graded]) -> Evaluation:
        """Answers in any order, each problem with the same number of samples.

        Raises:
            ValueError: no answers, or problems with different numbers of them.
        """
        by_problem: dict[int, dict[int, Graded]] = {}
        for answer in graded:
            by_problem.setdefault(answer.index, {})[answer.sample] = answer
        counts = {len(samples) for samples in by_problem.values()}
        if len(counts) != 1:
            raise ValueError(f"Every problem needs the same number of samples, at least one; found {sorted(counts)}.")
        return cls(tuple(tuple(by_problem[i][j] for j in sorted(by_problem[i])) for i in sorted(by_problem)))

    @property
    def ids(self) -> list[str]:
        """Ids of the problems."""
        return [row[0].problem for row in self.answers]

    @property
    def correct(self) -> list[list[bool]]:
        """Problems x samples."""
        return [[answer.verdict == Verdict.RIGHT for answer in row] for row in self.answers]

    @property
    def responses(self) -> list[list[str]]:
        """Problems x samples."""
        return [[answer.response for answer in row] for row in self.answers]

    @property
    def lengths(self) -> list[list[int]]:
        """Problems x samples, in the model's own tokens."""
        return [[answer.tokens for answer in row] for row in self.answers]

    def values(self, metric: str) -> np.ndarray:
        """Values per problem ``[P]`` of ``avg_at_k``, ``best_at_k``, ``pass_at_4`` (any number), ``distinct_4``,
        ``mean_length``, ``cut_off``, ``no_box`` or ``undecided``; nan where a problem does not count.

        Raises:
            ValueError: another name.
        """
        if metric.startswith("pass_at_") and metric[8:].isdigit():
            return pass_per_problem(self.correct, int(metric[8:]))
        known = {
            "avg_at_k": lambda: avg_per_problem(self.correct),
            "best_at_k": lambda: best_per_problem(self.correct),
            "distinct_4": lambda: distinct_per_problem(self.responses),
            "mean_length": lambda: np.array(self.lengths, dtype=float).mean(1),
            "cut_off": lambda: self._share(lambda answer: answer.cut_off),
            "no_box": lambda: self._share(lambda answer: answer.verdict == Verdict.NO_BOX),
            "undecided": lambda: self._share(lambda answer: answer.verdict == Verdict.UNDECIDED),
        }
        if metric not in known:
            raise ValueError(f"There is no metric {metric!r}: give {', '.join(known)} or pass_at_N.")
        return known[metric]()

    def _share(self, is_so) -> np.ndarray:
        return np.array([[100.0 * is_so(answer) for answer in row] for row in self.answers]).mean(1)

    def estimate(self, metric: str) -> dict[str, float]:
        """Mean over problems with its 95 % interval: ``{value, low, high}``; in percent, lengths in tokens. None three times
        where no problem counts."""
        values = self.values(metric)
        values = values[~np.isnan(values)]
        if not len(values):  # answers of fewer than four words, all of them
            return {"value": None, "low": None, "high": None}
        low, high = bootstrap_interval(values, bounds=None if metric == "mean_length" else (0, 100))
        return {"value": float(values.mean()), "low": low, "high": high}

    def summary(self) -> dict[str, Any]:
        """Every metric: those of interest with intervals, shares as numbers."""
        samples = len(self.answers[0])
        powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
        measured: dict[str, Any] = {"problems": len(self.answers), "samples": samples}
        for metric in ("avg_at_k", "best_at_k", *(f"pass_at_{k}" for k in powers), "distinct_4", "mean_length"):
            measured[metric] = self.estimate(metric)
        for metric in ("cut_off", "no_box", "undecided"):
            measured[metric] = float(self.values(metric).mean())
        return measured | {"tokens": sum(map(sum, self.lengths))}


def paired(
    first: Evaluation, second: Evaluation, metric: str, *, names: tuple[str, str] = ("one", "the other")
) -> PairedComparison:
    """``second`` minus ``first`` in a metric, problem by problem.

    Raises:
        ValueError: they answered different problems.
    """
    ours, theirs = (dict(zip(one.ids, one.values(metric), strict=True)) for one in (first, second))
    if ours.keys() != theirs.keys():
        alone = len(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"{names[0]} and {names[1]} answered different problems ({alone} are in one of them only). Evaluate both with the same --on and --limit."
        )
    order = sorted(ours)
    return paired_comparison(np.array([ours[i] for i in order]), np.array([theirs[i] for i in order]))


def graded_of(row: Mapping[str, Any]) -> Graded:
    """A line of ``responses.jsonl``.

    Raises:
        ValueError: a field is missing or unknown.
    """
    try:
        return Graded(**row)
    except TypeError as error:
        raise ValueError(f"not a line of an evaluation ({error})") from error
