"""Folders that appear whole or not at all: written beside their place, hashed, brought to the disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from oprd.lineage.hashing import file_hash, files_below
from oprd.records import read_json, sync, write_json

STAGING, REPLACED = ".saving-", ".replaced-"
CHECKSUMS = "checksums.json"


def staging_of(target: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return target.with_name(STAGING + target.name)


@contextmanager
def staged(target: Path, *, with_checksums: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``target`` when the block is left without an error.

    Args:
        with_checksums: add `CHECKSUMS`, for `damage`.

    Raises:
        OSError: it could not be written; the folder and the cause are named, nothing of it stays, ``target`` is untouched.
    """
    staging = staging_of(target)
    with writing(target, staging):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        publish(staging, target, with_checksums=with_checksums)


@contextmanager
def writing(target: Path, staging: Path | None = None) -> Iterator[None]:
    """Errors of the block name what was being written; ``staging`` is removed.

    Raises:
        OSError: for one without a file's name, and for what safetensors makes of one.
    """
    try:
        yield
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        is_full = any(
            f"os error {code}" in str(error) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
        )
        if isinstance(error, OSError | SafetensorError) or is_full:
            cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise OSError(
                f"{target} could not be written: {cause}. What was saved before is intact; the same command continues once "
                "that is put right."
            ) from error
        raise


def publish(staging: Path, target: Path, *, with_checksums: bool = False) -> None:
    """Bring everything to the disk, then rename; what was in the place is removed afterwards."""
    names = sorted(files_below(staging, hidden=True))
    if with_checksums:
        write_json(staging / CHECKSUMS, {"files": _measured(staging, names)})
    sync(*(staging / name for name in names))
    sync(*(Path(folder) for folder, _, _ in os.walk(staging)))
    replaced = target.with_name(REPLACED + target.name)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
    os.rename(staging, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean(directory: Path) -> list[str]:
    """Remove what a kill left half-way, put back what was about to be replaced; names of what was found."""
    found = []
    for left in sorted(directory.glob(f"{REPLACED}*")):
        found.append(left.name)
        target = directory / left.name.removeprefix(REPLACED)
        if target.exists():
            shutil.rmtree(left)
        else:  # killed between two renames
            os.rename(left, target)
    for left in sorted(directory.glob(f"{STAGING}*")):
        found.append(left.name)
        shutil.rmtree(left)
    return found


def _measured(directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files; hashing lets other threads run."""

    def measure(name: str) -> dict[str, Any]:
        return {"size": (directory / name).stat().st_size, "sha256": file_hash(directory / name)}

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(measure, names), strict=True))


def damage(directory: Path) -> str | None:
    """What is wrong with a folder that was published with checksums, in words that name the file; None if it is whole.

    Files that were added later are none of its business.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return f"{CHECKSUMS} is missing"
    try:
        files = read_json(path)["files"]
        wanted = {name: (said["size"], said["sha256"]) for name, said in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} is broken"
    for name, (size, _) in wanted.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if (directory / name).stat().st_size != size:
            return f"{name} has {(directory / name).stat().st_size} bytes, not {size}"
    for name, found in _measured(directory, sorted(wanted)).items():
        if found["sha256"] != wanted[name][1]:
            return f"{name} has another content than was written"
    return None
