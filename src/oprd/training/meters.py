"""What is measured while it trains: sums behind the logged averages (tensors on the device, one reduction per log), seconds
and memory."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from oprd.training.at_layers import DISTANCE, POWER, Sums
from oprd.training.lessons import Terms


class Meters:
    """Adds up loss terms and per-position sums over micro-batches; reduces over processes when read."""

    def __init__(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._batches = 0
        self.of_update: Sums = {}  # what running means are taken of, since the last one was

    def add(self, terms: Terms, sums: Sums) -> None:
        """Take in one micro-batch. Nothing leaves the device."""
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()
        for name, (total, count) in sums.items():
            if f"{DISTANCE}/" in name or f"{POWER}/" in name:
                before, counted = self.of_update.get(name, (0, 0))
                self.of_update[name] = (before + total.detach(), counted + count)
            self._sums[name] = self._sums.get(name, 0) + total.detach()
            self._counts[name] = self._counts.get(name, 0) + count

    def snapshot(self) -> tuple[dict[str, Tensor], ...]:
        """What `restore` goes back to; batches that have ended stay ended."""
        return dict(self._terms), dict(self._sums), dict(self._counts), dict(self.of_update)

    def restore(self, snapshot: tuple[dict[str, Tensor], ...]) -> None:
        """Forget what was added since."""
        self._terms, self._sums, self._counts, self.of_update = (dict(part) for part in snapshot)

    def end_batch(self) -> None:
        """All micro-batches of one accumulation step, or of one evaluation batch, are in."""
        self._batches += 1

    def read(self, accelerator: Accelerator, accumulation: int) -> dict[str, float]:
        """Averages over all processes since the last read; empties the meters. Every process must call it."""
        if not self._batches:
            return {}
        steps = self._batches / accumulation
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


class MemoryWatch:
    """Peak bytes on this process's GPU: over all, and by how much an update rose above what was there. 0 without one."""

    def __init__(self, device: torch.device) -> None:
        self._is_on = device.type == "cuda"
        self._start = 0
        self._rise = 0
        self.peak = 0

    def begin(self) -> None:
        """A micro-batch is about to run."""
        if self._is_on:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
            self._start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def end(self) -> None:
        """The micro-batch is through, backward and all."""
        if self._is_on:
            highest = torch.cuda.max_memory_allocated()
            self.peak = max(self.peak, highest)
            self._rise = max(self._rise, highest - self._start)

    def read(self) -> int | None:
        """The largest rise of a micro-batch since the last read, in bytes; None without a GPU."""
        rise, self._rise = self._rise, 0
        return rise if self._is_on else None
