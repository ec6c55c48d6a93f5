"""Which evaluations a run holds: ``evaluations/<who>/<benchmark>/``, who being final, best, student, teacher or step-N."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVALUATIONS = "evaluations"
SUMMARY = "summary.json"
ROLES = ("final", "best", "student", "teacher")


@dataclass(frozen=True)
class Found:
    """One finished evaluation."""

    who: str
    benchmark: str
    directory: Path
    summary: dict[str, Any]

    @property
    def step(self) -> int | None:
        """The update after which it was made, where it was made during training."""
        number = self.who.removeprefix("step-")
        return int(number) if number != self.who and number.isdecimal() else None


def find_evaluations(run: Path) -> list[Found]:
    """Every finished evaluation of a run, in the order of names."""
    from oprd.evaluation.evaluate import read_summary  # here, for the command line reads this file first

    found = []
    for path in sorted(Path(run).glob(f"{EVALUATIONS}/*/*/{SUMMARY}")):
        found.append(Found(path.parent.parent.name, path.parent.name, path.parent, read_summary(path)))
    return found


def of_final(found: Iterable[Found], last_step: int | None = None) -> dict[str, Found]:
    """One evaluation of the final student for each benchmark: ``final``'s, else the one made after the last update."""
    chosen: dict[str, Found] = {}
    for one in found:
        after_last = last_step is not None and one.step == last_step
        if one.who == "final" or (after_last and one.benchmark not in chosen):
            chosen[one.benchmark] = one
    return chosen


def last_update(manifest: dict[str, Any]) -> int | None:
    """The update that a finished run ended with."""
    return manifest.get("last_update")
