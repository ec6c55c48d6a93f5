"""What the states of two models have in common, as sums over a stream of paired positions.

Shapes: N pairs, M a sample of them, L layer pairs (L_S, L_T layers), d width (d_S, d_T), K buckets. Nothing here grows with
the number of positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OUTLIERS = 4  # dimensions of largest mean square, where massive activations live
MASSIVE_SIZE, MASSIVE_RATIO = 100.0, 1000.0  # of "Massive Activations in Large Language Models", arXiv 2402.17762
BUCKETS = 24  # lengths up to 2^23


def u_centred(kernel_MM: Tensor) -> Tensor:
    """A kernel whose inner product with another one, over ``M (M - 3)``, is the unbiased HSIC of the two (Szekely and
    Rizzo 2014; Song et al. 2012, Eq. 5). The diagonal is left out."""
    count = len(kernel_MM)
    kernel_MM = kernel_MM - torch.diag(kernel_MM.diagonal())
    rows_M = kernel_MM.sum(0) / (count - 2)
    centred = kernel_MM - rows_M - rows_M[:, None] + kernel_MM.sum() / ((count - 1) * (count - 2))
    return centred - torch.diag(centred.diagonal())


class KernelAlignment:
    """Linear CKA of every layer of one model with every layer of another: ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))``,
    ``K = X X'``, from unbiased estimates on batches (Nguyen et al. 2021). Widths may differ, and few rows in a wide
    space do not inflate it, as they do the plain estimate."""

    def __init__(self, own_layers: int, other_layers: int) -> None:
        self.cross = torch.zeros(own_layers, other_layers, dtype=torch.float64)
        self.own = torch.zeros(own_layers, dtype=torch.float64)
        self.other = torch.zeros(other_layers, dtype=torch.float64)

    @torch.no_grad()
    def update(self, own: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Paired rows, ``[M, d_S]`` of each layer and ``[M, d_T]`` of each; fewer than four say nothing."""
        if len(own[0]) < 4:
            return
        kernels = [self._kernels(states) for states in (own, other)]
        self.cross += (kernels[0] @ kernels[1].T).cpu()
        self.own += kernels[0].square().sum(1).cpu()
        self.other += kernels[1].square().sum(1).cpu()

    @staticmethod
    def _kernels(states: Sequence[Tensor]) -> Tensor:
        rows = len(states[0])
        doubles = (layer.double() for layer in states)
        return torch.stack([u_centred(x @ x.T).flatten() for x in doubles]) / (rows * (rows - 3)) ** 0.5

    def matrix(self) -> Tensor:
        """``[L_S, L_T]``; NaN where a layer does not vary."""
        return self.cross / (self.own[:, None] * self.other[None]).sqrt()


class ByPosition:
    """Means of some quantities over the first k and over the last k positions of the responses, k = 1, 2, 4, ... (Fig. 8).
    A response shorter than k counts whole."""

    def __init__(self, quantities: int) -> None:
        self.sums = torch.zeros(2, quantities, BUCKETS, dtype=torch.float64)
        self.counts = torch.zeros(2, BUCKETS, dtype=torch.float64)

    @torch.no_grad()
    def update(self, values_QN: Tensor, before_N: Tensor, after_N: Tensor) -> None:
        """Values at N positions, with how many positions of their response are before and after each."""
        for side, distance_N in enumerate((before_N, after_N)):
            bucket_N = torch.ceil(torch.log2((distance_N + 1).double())).long().clamp(max=BUCKETS - 1)
            self.sums[side].index_add_(1, bucket_N.cpu(), values_QN.double().cpu())
            self.counts[side] += torch.bincount(bucket_N.cpu(), minlength=BUCKETS)

    def curves(self) -> list[dict[str, float | list[float]]]:
        """One entry a k, up to the first that holds everything: ``k``, ``first`` and ``last``, each a value a quantity."""
        filled = int(self.counts.sum(0).nonzero().max()) + 1 if self.counts.any() else 0
        first, last = (self.sums[s].cumsum(1) / self.counts[s].cumsum(0).clamp(min=1) for s in (0, 1))
        return [{"k": 2**b, "first": first[:, b].tolist(), "last": last[:, b].tolist()} for b in range(filled)]


class StateSums:
    """One layer pair of one width: how near the student's states are to the teacher's as they stand."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.cosine = self.shuffled = self.trimmed = 0.0
        self.gap_d, self.other_d, self.other_2_d, self.own_2_d = (
            torch.zeros(width, dtype=torch.float64, device=device) for _ in range(4)
        )
        self._kept_d: Tensor | None = None

    @torch.no_grad()
    def update(self, own_Nd: Tensor, other_Nd: Tensor, order_N: Tensor) -> Tensor:
        """Add paired rows; ``order_N`` pairs them by chance instead, for the control. Returns their cosines ``[N]``.

        Which dimensions count as outliers is settled by the first rows.
        """
        own, other = own_Nd.float(), other_Nd.float()
        cosine_N = F.cosine_similarity(own, other, dim=-1)
        self.count += len(own)
        self.cosine += cosine_N.sum(dtype=torch.float64).item()
        self.shuffled += F.cosine_similarity(own, other[order_N], dim=-1).sum(dtype=torch.float64).item()
        self.gap_d += (own - other).double().square().sum(0)
        self.other_d += other.sum(0, dtype=torch.float64)
        self.other_2_d += other.double().square().sum(0)
        self.own_2_d += own.double().square().sum(0)
        if self._kept_d is None:
            self._kept_d = ~_outliers(self.own_2_d, self.other_2_d)
        trimmed = F.cosine_similarity(own[:, self._kept_d], other[:, self._kept_d], dim=-1)
        self.trimmed += trimmed.sum(dtype=torch.float64).item()
        return cosine_N

    def result(self) -> dict[str, float]:
        """``cosine``; ``cosine_shuffled`` of pairs by chance; ``cosine_trimmed`` without the outlier dimensions;
        ``distance``, Eq. 6 of this layer; ``explained = 1 - E|h_S - h_T|^2 / E|h_T - mu|^2`` without the outlier dimensions:
        above 0, the student's states tell more of the teacher's than a constant does."""
        kept_d = ~_outliers(self.own_2_d, self.other_2_d)
        variance_d = self.other_2_d - self.other_d.square() / self.count
        return {
            "cosine": self.cosine / self.count,
            "cosine_shuffled": self.shuffled / self.count,
            "cosine_trimmed": self.trimmed / self.count,
            "distance": float(self.gap_d.mean() / self.count),
            "explained": float(1 - self.gap_d[kept_d].sum() / variance_d[kept_d].sum().clamp(min=1e-30)),
        }


def _outliers(own_2_d: Tensor, other_2_d: Tensor) -> Tensor:
    """Bool ``[d]``: the dimensions that carry most of either side's mean square."""
    share_d = own_2_d / own_2_d.sum().clamp(min=1e-30) + other_2_d / other_2_d.sum().clamp(min=1e-30)
    found_d = torch.zeros_like(share_d, dtype=torch.bool)
    found_d[share_d.topk(min(OUTLIERS, len(share_d) - 1)).indices] = True
    return found_d


class ActivationSums:
    """How large one layer's states are, and in how few dimensions; over all positions read, prompts too."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.square_d = torch.zeros(width, dtype=torch.float64, device=device)
        self.peak_d = torch.zeros(width, dtype=torch.float32, device=device)
        self.medians, self.batches, self.count = 0.0, 0, 0

    @torch.no_grad()
    def update(self, states_Nd: Tensor) -> None:
        """Add rows."""
        sizes = states_Nd.float().abs()
        self.square_d += sizes.double().square().sum(0)
        self.peak_d = torch.maximum(self.peak_d, sizes.amax(0))
        self.medians += float(sizes.median())
        self.batches += 1
        self.count += len(sizes)

    def result(self) -> dict[str, float | list[int] | bool]:
        """``rms``; ``peak`` and its ratio to the median size; ``outlier_share`` of the mean square in the largest
        dimensions, and those; whether activations are massive: over 100 and over 1,000 times the median."""
        median, peak = self.medians / max(self.batches, 1), float(self.peak_d.max())
        top = self.square_d.topk(min(OUTLIERS, len(self.square_d)))
        ratio = peak / max(median, 1e-30)
        return {
            "rms": float((self.square_d.mean() / max(self.count, 1)).sqrt()),
            "peak": peak,
            "peak_over_median": ratio,
            "outlier_share": float(top.values.sum() / self.square_d.sum().clamp(min=1e-30)),
            "outliers": top.indices.tolist(),
            "massive": peak > MASSIVE_SIZE and ratio > MASSIVE_RATIO,
        }
