"""Scores of problems x samples, all in percent. Pure; numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import numpy as np

Scores = Sequence[Sequence[bool | float]]


def _matrix(correct: Scores) -> np.ndarray:
    matrix = np.asarray(correct, dtype=float)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"Expected problems x samples with at least one of each, got shape {matrix.shape}.")
    return matrix


def avg_at_k(correct: Scores) -> float:
    """Avg@k: share of right answers over problems and their k samples, in percent."""
    return float(_matrix(correct).mean() * 100)


def best_at_k(correct: Scores) -> float:
    """Best@k: share of problems with at least one right answer among their k samples, in percent."""
    return float(_matrix(correct).max(axis=1).mean() * 100)


def pass_at_k(correct: Scores, k: int) -> float:
    """Unbiased pass@k from n >= k samples a problem, in percent: mean of ``1 - C(n - c, k) / C(n, k)``."""
    matrix = _matrix(correct)
    samples = matrix.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {samples} samples.")
    chances = [1 - comb(samples - int(row.sum()), k) / comb(samples, k) for row in matrix]
    return float(np.mean(chances) * 100)


def distinct_n(texts: Sequence[Sequence[str]], n: int = 4) -> float:
    """Distinct n-grams of whitespace tokens over all n-grams, pooled over a problem's samples, mean over problems.

    In percent. Problems whose samples are all shorter than ``n`` tokens do not count; with none left it is 0.
    """
    ratios = []
    for samples in texts:
        grams = [
            tuple(tokens[i : i + n])
            for tokens in (text.split() for text in samples)
            for i in range(len(tokens) - n + 1)
        ]
        if grams:
            ratios.append(len(set(grams)) / len(grams))
    return float(np.mean(ratios) * 100) if ratios else 0.0


def bootstrap_interval(
    correct: Scores,
    statistic: Callable[[Scores], float] = avg_at_k,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic`` over problems (samples of one problem stay together)."""
    matrix = _matrix(correct)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(matrix), size=(resamples, len(matrix)))
    values = [statistic(matrix[draw]) for draw in draws]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
