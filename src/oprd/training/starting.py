"""What a run finds in its folder, and what follows: begin, continue, or refuse. The main process looks; all hear of it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from oprd.durability.checkpoint_files import checkpoints_of, newest_whole, whole
from oprd.durability.folders import clean
from oprd.durability.stopping import Stopped
from oprd.lineage.hashing import folder_hashes
from oprd.lineage.manifest import NAME, read_manifest

logger = logging.getLogger(__name__)  # only the main process comes here

LOCK, LOCK_SECONDS = ".lock", 2.0
Found = TypeVar("Found")


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Args:
        checkpoint: to continue from; None for a run from the beginning.
        goes_on: whether the manifest that is there is this run's.
        is_done: there is nothing left to do.
        is_trained: ``final/`` is there, and only the record of it is missing.
    """

    checkpoint: str | None = None
    goes_on: bool = False
    is_done: bool = False
    is_trained: bool = False


def together(look: Callable[[], Found]) -> Found:
    """What the main process finds, on every process.

    Raises:
        ValueError, OSError: as it does, everywhere.
    """
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = look()
        except (ValueError, OSError) as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@contextmanager
def leaving() -> Iterator[None]:
    """Processes take leave of each other when all is done, or stopped; after an error the others might never come."""
    state, stopped = PartialState(), None
    try:
        yield
    except Stopped as error:
        stopped = error
    if state.num_processes > 1:  # left to the interpreter's end, gloo's threads may take the process down with them
        state.wait_for_everyone()
        state.destroy_process_group()
    if stopped is not None:
        raise stopped


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The folder is this run's alone; a folder in which nothing came to lie is gone afterwards.

    Raises:
        ValueError: another process writes there.
    """
    lock = FileLock(directory / LOCK, timeout=LOCK_SECONDS)
    is_new = not directory.exists()

    def take() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"Another process is at work in {directory}. Wait for it, stop it, or choose another folder."
            ) from error

    together(take)
    try:
        yield
    finally:
        lock.release()
        if PartialState().is_main_process and is_new and not any(p.name != LOCK for p in directory.iterdir()):
            (directory / LOCK).unlink(missing_ok=True)
            directory.rmdir()


def same_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that differ, each as words."""
    now = json.loads(json.dumps(now))  # as they come back from a file
    # The folder is the same one, however it was spelt; and where numbers are shown changes none of them.
    unlike = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    names = set(unlike) - {"output_dir", "report_to"}
    return [f"{name}: {before.get(name)} there, {now.get(name)} now" for name in sorted(names)]


def plan_start(directory: Path, settings: dict[str, Any], *, resume: bool, named: str | None, max_steps: int) -> Start:
    """Look into a run's folder, clear away what a kill left half-way, and decide. Main process only.

    The same command continues an unfinished run. Other settings need ``resume``, and so does a folder without a manifest.

    Args:
        settings: the recipe as resolved.
        resume, named: ``--resume``, and ``--resume_from_checkpoint``.
        max_steps: how many updates are wanted, or something below 1.

    Raises:
        ValueError: the run has finished, has other settings (they are named), or none of its checkpoints is whole.
    """
    _tidy(directory)
    manifest = read_manifest(directory) if (directory / NAME).exists() else None
    differing = None if manifest is None else same_settings(manifest["config"], settings)
    is_same, is_open = differing == [], manifest is not None and manifest["status"] != "finished"
    if (directory / "final").exists():
        if is_open and (is_same or resume) and _is_recorded(directory, manifest):
            return Start(goes_on=True, is_trained=True)
        if not resume and not (is_open and is_same):
            raise ValueError(f"{directory} holds a finished run. Choose another output_dir, or remove it.")
        reached = manifest is not None and 0 < max_steps <= (manifest.get("last_update") or 0)
        if manifest is not None and not is_open and (reached or is_same):
            logger.info(f"{directory} has finished; there is nothing to resume.")
            return Start(is_done=True)
    found = checkpoints_of(directory)
    if found and not (resume or named or is_same):
        newest = found[0][1].name
        if not differing:
            raise ValueError(
                f"{directory} already holds {newest}. Continue it with --resume, or choose another output_dir."
            )
        raise ValueError(
            f"{directory} already holds {newest} of a run with other settings ({'; '.join(differing)}). Give it its own "
            "settings, continue it with these by --resume, or choose another output_dir."
        )
    before, now = _processes(manifest), PartialState().num_processes
    if found and before not in (None, now) and not (resume or named):
        raise ValueError(
            f"{directory} was run by {before} processes and this is {now}: with the same batch a step would have "
            f"{'fewer' if now < before else 'more'} responses. Start {before}, or continue with --resume and a "
            "gradient_accumulation_steps that keeps the responses of a step."
        )
    checkpoint = whole(Path(named)) if named else newest_whole(directory)
    if checkpoint is not None:
        logger.info(f"{directory} continues from {Path(checkpoint).name}.")
    elif is_open and is_same:
        logger.info(f"{directory} was stopped before its first checkpoint and starts from the beginning.")
    if checkpoint is None and not (directory / "final").exists():
        _forget_best(directory)
    return Start(checkpoint, goes_on=checkpoint is not None or (is_open and is_same))


def _processes(manifest: dict[str, Any] | None) -> int | None:
    """In how many processes the run was last at work; None if that is not known."""
    sessions = [] if manifest is None else manifest.get("sessions", [])
    return sessions[-1].get("hardware", {}).get("processes") if sessions else None


def _is_recorded(directory: Path, manifest: dict[str, Any]) -> bool:
    """Whether ``final/`` is what the manifest was about to announce: the run was killed between the two."""
    said = manifest.get("final")
    return said is not None and folder_hashes(directory / "final") == said["files"]


def _tidy(directory: Path) -> None:
    if not directory.is_dir():
        return
    found = clean(directory)
    linked = (directory / "best").resolve() if (directory / "best").is_symlink() else None
    for path in directory.glob("best-step-*"):  # written, but no longer or not yet what best means
        if path.resolve() != linked:
            found.append(path.name)
            shutil.rmtree(path)
    if found:
        logger.info(f"{directory}: cleared away what a kill left half-way ({', '.join(sorted(found))}).")


def _forget_best(directory: Path) -> None:
    """A run from the beginning starts without a best student."""
    (directory / "best").unlink(missing_ok=True)
    for path in directory.glob("best-step-*"):
        shutil.rmtree(path)
