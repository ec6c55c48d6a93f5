"""Running sums behind the logged averages: tensors on the device, one reduction per log."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from oprd.training.objective import Sums, Terms


class Meters:
    """Adds up loss terms and per-position sums over micro-batches; reduces over processes when read."""

    def __init__(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._micro_batches = 0

    def add(self, terms: Terms, sums: Sums) -> None:
        """Take in one micro-batch. Nothing leaves the device."""
        self._micro_batches += 1
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()
        for name, (total, count) in sums.items():
            self._sums[name] = self._sums.get(name, 0) + total.detach()
            self._counts[name] = self._counts.get(name, 0) + count

    def read(self, accelerator: Accelerator, accumulation: int) -> dict[str, float]:
        """Averages over all processes since the last read; empties the meters. Every process must call it."""
        if not self._micro_batches:
            return {}
        steps = self._micro_batches / accumulation
        terms, sums = sorted(self._terms), sorted(self._sums)
        values = [self._terms[n] for n in terms] + [self._sums[n] for n in sums] + [self._counts[n] for n in sums]
        reduced = accelerator.reduce(torch.stack([v.float() for v in values]), reduction="sum").tolist()
        totals, counts = reduced[len(terms) : len(terms) + len(sums)], reduced[len(terms) + len(sums) :]
        averages = {f"loss/{name}": value / steps for name, value in zip(terms, reduced, strict=False)}
        averages |= {n: t / c for n, t, c in zip(sums, totals, counts, strict=True) if c > 0}
        self.__init__()
        return averages


class Stopwatch:
    """Seconds spent per phase since the last read. Waits for the device, so that a phase pays for its own kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read(self) -> dict[str, float]:
        """The phases so far; starts again from zero."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken
