"""The checkpoints of a run as files: which there are, which are as they were written, which go."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from oprd.durability.folders import CHECKSUMS, damage

logger = logging.getLogger(__name__)  # only the main process comes here

PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth")


class Whole(str):
    """The path of a checkpoint whose files have been held against their checksums."""


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, the newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(run).glob("checkpoint-*")]
    return sorted(((int(m[1]), path) for m, path in found if m and path.is_dir()), reverse=True)


def whole(checkpoint: Path) -> Whole:
    """The checkpoint, if every file is as it was written.

    Raises:
        ValueError: it is damaged (the file is named), it holds pickles of an older version, or there is none.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise ValueError(f"There is no checkpoint {checkpoint}.")
    refuse_pickles(checkpoint)
    found = damage(checkpoint)
    if found is not None:
        raise ValueError(f"{checkpoint} is damaged: {found}. Resume from another checkpoint.")
    return Whole(checkpoint)


def newest_whole(run: Path) -> Whole | None:
    """The newest checkpoint that is as it was written; None if the run never had one. Says which were passed over.

    Raises:
        ValueError: there are checkpoints and all are damaged, or the newest is an older version's.
    """
    passed = []
    for _, path in checkpoints_of(run):
        refuse_pickles(path)
        found = damage(path)
        if found is None:
            if passed:
                logger.warning(f"Damaged: {'; '.join(passed)}. Going on from {path.name}, the newest that is whole.")
            return Whole(path)
        passed.append(f"{path.name} ({found})")
    if passed:
        raise ValueError(
            f"No checkpoint in {run} is whole: {'; '.join(passed)}. Restore one, or remove them to start from the beginning."
        )
    return None


def refuse_pickles(checkpoint: Path) -> None:
    """A pickle runs whatever code it holds, so none is read.

    Raises:
        ValueError: the checkpoint is of a version that wrote its optimiser that way.
    """
    found = [name for name in PICKLES if (checkpoint / name).exists()]
    if found and not (checkpoint / CHECKSUMS).exists():
        raise ValueError(
            f"{checkpoint} was written by another version ({found[0]} is a pickle, which is not read). Start a new run from "
            f"its weights: model_name_or_path: {checkpoint}."
        )


def rotate(run: Path, step: int, best: int | None, limit: int | None) -> None:
    """Remove checkpoints beyond ``limit``: of a future that was given up first, then the oldest; never ``step``'s nor the best."""
    if not limit or limit < 1:
        return
    others = [(number, path) for number, path in checkpoints_of(run) if number not in (step, best)]
    kept = len(checkpoints_of(run)) - len(others)
    going = sorted(others, key=lambda item: (item[0] < step, item[0]))
    for _, path in going[: max(len(others) - max(limit - kept, 0), 0)]:
        shutil.rmtree(path, ignore_errors=True)
