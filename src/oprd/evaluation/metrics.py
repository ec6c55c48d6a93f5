"""Scores of problems x samples, their intervals and comparisons, all in percent. Pure; numpy only.

Every metric is a mean over problems of a per-problem value, so problems are what intervals and comparisons resample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

Scores = Sequence[Sequence[bool | float]]
Values = Sequence[float] | np.ndarray

_EXACT_FLIPS = 16  # up to so many non-zero differences every sign pattern is enumerated (65,536 sums)
_CHUNK = 2**20  # random draws held at once
_NORMAL = NormalDist()


def _matrix(correct: Scores) -> np.ndarray:
    matrix = np.asarray(correct, dtype=float)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"Expected problems x samples with at least one of each, got shape {matrix.shape}.")
    return matrix


def avg_per_problem(correct: Scores) -> np.ndarray:
    """Share of right answers among each problem's samples, in percent: ``[P]``."""
    return _matrix(correct).mean(axis=1) * 100


def best_per_problem(correct: Scores) -> np.ndarray:
    """100 for each problem with at least one right answer, else 0: ``[P]``."""
    return _matrix(correct).max(axis=1) * 100


def pass_per_problem(correct: Scores, k: int) -> np.ndarray:
    """Unbiased pass@k of each problem from its n >= k samples, c of them right, in percent: ``[P]``.

    ``1 - C(n - c, k) / C(n, k)``: the share of subsets of k samples that hold a right one.
    """
    matrix = _matrix(correct)
    samples = matrix.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {samples} samples.")
    return np.array([100 * (1 - comb(samples - int(row.sum()), k) / comb(samples, k)) for row in matrix])


def distinct_per_problem(texts: Sequence[Sequence[str]], n: int = 4) -> np.ndarray:
    """Distinct n-grams of whitespace tokens over all n-grams, pooled over each problem's samples, in percent: ``[P]``.

    nan for a problem whose samples are all shorter than ``n`` tokens.
    """
    shares = []
    for samples in texts:
        grams = [
            tuple(tokens[i : i + n])
            for tokens in (text.split() for text in samples)
            for i in range(len(tokens) - n + 1)
        ]
        shares.append(100 * len(set(grams)) / len(grams) if grams else np.nan)
    return np.array(shares, dtype=float)


def avg_at_k(correct: Scores) -> float:
    """Avg@k: share of right answers over problems and their k samples, in percent."""
    return float(avg_per_problem(correct).mean())


def best_at_k(correct: Scores) -> float:
    """Best@k: share of problems with at least one right answer among their k samples, in percent."""
    return float(best_per_problem(correct).mean())


def pass_at_k(correct: Scores, k: int) -> float:
    """Unbiased pass@k from n >= k samples a problem, in percent: mean of ``1 - C(n - c, k) / C(n, k)``."""
    return float(pass_per_problem(correct, k).mean())


def distinct_n(texts: Sequence[Sequence[str]], n: int = 4) -> float:
    """Distinct n-grams of whitespace tokens over all n-grams, pooled over a problem's samples, mean over problems.

    In percent. Problems whose samples are all shorter than ``n`` tokens do not count; with none left it is 0.
    """
    shares = distinct_per_problem(texts, n)
    shares = shares[~np.isnan(shares)]
    return float(shares.mean()) if shares.size else 0.0


def bootstrap_interval(
    values: Values | Scores,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    bounds: tuple[float, float] | None = (0, 100),
) -> tuple[float, float]:
    """Interval of the mean over problems, from a bootstrap over problems (samples of one problem stay together).

    ``values``: one value a problem ``[P]`` (nan: left out), or problems x samples, which stand for their Avg@k.
    ``bounds``: the range that a value can take, also the interval's; None for what has no such range (lengths).

    Method: BCa (bias-corrected and accelerated) percentiles, with Student's quantile in place of the normal one. Plain
    percentiles hold the truth too rarely with few problems, most of all for skewed values; of the corrections that
    were simulated this one stays closest to 95 % from 30 problems on, skewed or not, but for a mean near a bound:
    91 % at a mean of 3 % (``benchmarks/interval_coverage.py``). Values that all lie on a bound (Best@k, pass@1 of one
    sample) are a proportion and get its Wilson score interval, whose far end is an exact limit where a count is 1 to
    3, as Wilson's is too short there (Brown, Cai and DasGupta 2001).

    No interval can see what no problem shows. Without any spread, within bounds, the value counts as a proportion of P
    problems, which is the widest reading; one problem gives the bounds themselves. Without bounds both give ``(v, v)``.

    Raises ``ValueError`` for no problem, values outside the bounds, bools without samples, an impossible level.
    """
    values = _per_problem(values)
    values = np.sort(values[~np.isnan(values)])  # the order of problems says nothing
    _check(values, level, resamples)
    if bounds is None:
        return _bootstrap(values, level, resamples, seed, skewed=True)
    floor, ceiling = map(float, bounds)
    if values[0] < floor or values[-1] > ceiling:
        raise ValueError(
            f"Values from {values[0]:g} to {values[-1]:g} leave the bounds ({floor:g}, {ceiling:g}); pass the range "
            "that they can take, or bounds=None for lengths and the like."
        )
    if len(values) == 1:
        return floor, ceiling
    if values[0] == values[-1] or np.isin(values, (floor, ceiling)).all():
        low, high = _proportion(float(values.mean() - floor) / (ceiling - floor), len(values), level)
        low, high = floor + low * (ceiling - floor), floor + high * (ceiling - floor)
    else:
        low, high = _bootstrap(values, level, resamples, seed, skewed=True)
    return max(low, floor), min(high, ceiling)  # beyond by rounding only


@dataclass(frozen=True)
class PairedComparison:
    """What ``paired_comparison`` found: mean of second minus first, its interval, and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    problems: int


def paired_comparison(
    first: Values | Scores,
    second: Values | Scores,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Two models on the same problems in the same order: ``difference`` is the mean of ``second - first``.

    ``first``, ``second``: as ``values`` of ``bootstrap_interval``; numbers of samples may differ. A problem counts
    where both have a value (no nan); ``problems`` is how many do. Any unit, so lengths compare too.

    The interval is the expanded percentile bootstrap (Hesterberg 2015) of the problems' differences. It corrects no
    skewness, unlike that of a score: differences are near symmetric with long tails, where skewness is noise and
    correcting it costs coverage. It has zero width if all differences are equal: one problem, or models that no problem tells apart.

    ``p_value``: sign-flip permutation test of "either model could have had either value" on each problem. Exact up to
    16 non-zero differences, else Monte Carlo with ``(1 + hits) / (1 + resamples)``; on 0/1 values it is McNemar's.

    Raises ``ValueError`` for different numbers of problems, and for no problem.
    """
    first, second = _per_problem(first), _per_problem(second)
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} problems cannot be paired; pass the same problems in the same order, "
            "with nan where a model has no value."
        )
    differences = second - first
    differences = np.sort(differences[~np.isnan(differences)])
    _check(differences, level, resamples)
    low, high = _bootstrap(differences, level, resamples, seed, skewed=False)
    p_value = _sign_flip(differences, resamples, seed)
    return PairedComparison(float(differences.mean()), low, high, p_value, len(differences))


def _per_problem(values: Values | Scores) -> np.ndarray:
    """Values ``[P]`` as they are, problems x samples as their Avg@k."""
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        return avg_per_problem(array)
    if array.dtype == bool:  # would be taken for 0 % and 1 %
        raise ValueError("Expected problems x samples, or a value in percent for each problem, got one bool for each.")
    return array.astype(float)


def _check(values: np.ndarray, level: float, resamples: int) -> None:
    if not len(values):
        raise ValueError("No problem has a value (all nan); score at least one.")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"Needs 0 < level < 1 and resamples >= 1, got {level} and {resamples}.")


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Shapes of at most ``_CHUNK`` elements (or one row) that add up to ``rows x columns``."""
    step = max(1, _CHUNK // columns)
    return ((min(step, rows - start), columns) for start in range(0, rows, step))


def _bootstrap(values: np.ndarray, level: float, resamples: int, seed: int, *, skewed: bool) -> tuple[float, float]:
    """Percentile interval of the mean of sorted ``values [P]``: BCa if ``skewed``, else expanded."""
    count, mean = len(values), float(values.mean())
    if values[0] == values[-1]:
        return float(values[0]), float(values[0])
    centred = values - mean
    reach = _student(level, count - 1)  # percentiles are as short as a normal interval
    if skewed:  # of a mean, bias correction and acceleration are one number: skewness / (6 sqrt(P))
        shift = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))
    else:  # resamples vary by variance / P, where variance / (P - 1) is unbiased
        shift, reach = 0.0, reach * sqrt(count / (count - 1))
    ends = [
        _NORMAL.cdf(shift + (shift + z) / max(1 - shift * (shift + z), 1e-9))  # <= 0 far out: the extreme resample
        for z in (-reach, reach)
    ]
    rng = np.random.default_rng(seed)
    small = np.min_scalar_type(count - 1)  # narrow integers are drawn faster
    means = [centred[rng.integers(0, count, shape, dtype=small)].mean(axis=1) for shape in _chunks(resamples, count)]
    low, high = mean + np.quantile(np.concatenate(means), ends)
    return float(low), float(high)


def _student(level: float, freedom: int) -> float:
    """Two-sided quantile of Student's t, Cornish-Fisher expansion; short below 4, where percentiles are at an end."""
    z = _NORMAL.inv_cdf((1 + level) / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _proportion(share: float, count: int, level: float) -> tuple[float, float]:
    """Wilson score interval of a share of ``count``, lengthened where successes or failures are 1 to 3."""
    z = _NORMAL.inv_cdf((1 + level) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    successes = round(share * count)
    low = min(middle - half, _rare_limit(successes, count, level))
    high = max(middle + half, 1 - _rare_limit(count - successes, count, level))
    return max(low, 0.0), min(high, 1.0)


def _rare_limit(hits: int, count: int, level: float) -> float:
    """Share at which ``hits`` or more of ``count`` have the chance ``1 - level``, for 1 to 3 hits; 1 otherwise."""
    if not 1 <= hits <= 3:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        fewer = sum(comb(count, i) * share**i * (1 - share) ** (count - i) for i in range(hits))
        low, high = (share, high) if fewer > level else (low, share)
    return low


def _sign_flip(differences: np.ndarray, resamples: int, seed: int) -> float:
    """Chance that the sum is at least as far from 0 if each difference had either sign."""
    sizes = np.sort(np.abs(differences[differences != 0]))
    far = abs(differences.sum()) - 1e-9 * sizes.sum()  # ties count, whatever the rounding
    if len(sizes) <= _EXACT_FLIPS:
        sums = np.zeros(1)
        for size in sizes:
            sums = np.concatenate([sums + size, sums - size])
        return float((np.abs(sums) >= far).mean())
    rng = np.random.default_rng(seed)
    hits = sum(
        int((np.abs(2 * (rng.integers(0, 2, shape, dtype=np.int8) @ sizes) - sizes.sum()) >= far).sum())
        for shape in _chunks(resamples, len(sizes))
    )
    return (1 + hits) / (1 + resamples)
