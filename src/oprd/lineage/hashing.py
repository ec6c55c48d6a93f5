"""Content hashes: two folders with the same hash hold the same model, wherever they lie and whatever they are called."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

# Beside a model, but not what makes it: prose, git's settings, how it was trained, where it came from.
SKIP = ("README.md", ".gitattributes", "training_args.bin", "run-manifest.json")


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hex.

    Raises:
        ValueError: there is no file.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path} to hash. Restore it, or name one that exists.")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(directory: str | os.PathLike, *, hidden: bool = False) -> Iterator[str]:
    """Names (relative, ``/`` between folders) of the files below a folder, links followed; hidden ones if asked for.

    Raises:
        ValueError: no folder, a link to nothing, or a link to a folder above it.
    """
    if not Path(directory).is_dir():
        raise ValueError(f"There is no folder {directory}. Restore it, or name one that exists.")
    yield from _walk(Path(directory), "", (), hidden)


def _walk(folder: Path, prefix: str, above: tuple[Path, ...], hidden: bool) -> Iterator[str]:
    real = folder.resolve()
    if real in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in. Remove it.")
    for entry in folder.iterdir():
        if entry.name.startswith(".") and not hidden:
            continue
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/", (*above, real), hidden)
        elif entry.is_file():
            yield prefix + entry.name
        elif entry.is_symlink():
            raise ValueError(f"{entry} is a link to nothing. Restore what it links to, or remove it.")


def folder_hashes(directory: str | os.PathLike, *, skip: Collection[str] = SKIP) -> dict[str, str]:
    """``{name: SHA-256}`` of the files that make a model, sorted by name: all but hidden ones and those called as in ``skip``.

    In a Hugging Face cache the link to a large file names its hash, which is believed: such a file is not read.

    Raises:
        ValueError: no folder, nothing in it, or a link that leads nowhere.
    """
    directory = Path(directory)
    names = sorted(name for name in files_below(directory) if name.rpartition("/")[2] not in skip)
    if not names:
        raise ValueError(f"{directory} holds no file of a model. Name a folder that save_pretrained wrote.")
    return {name: _blob_hash(directory / name) or file_hash(directory / name) for name in names}


def _blob_hash(path: Path) -> str | None:
    """The hash that a Hub cache gives a large file as its name; small ones bear git's SHA-1, of 40 digits."""
    target = path.resolve()
    named = path.is_symlink() and target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name)
    return target.name if named else None


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over names and hashes, in whatever order they come.

    Raises:
        ValueError: there are none; every empty folder would be the same model.
    """
    if not hashes:
        raise ValueError("There are no hashes to combine. Pass what folder_hashes returns.")
    # JSON quotes names, so that no two sets of pairs read the same.
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What tells one folder's hashes from another's, a line for each file."""
    lines = []
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            how = "was added" if name not in before else "is missing" if name not in after else "changed"
            lines.append(f"{name} {how}")
    return lines


def copy_folder(source: Path, target: Path) -> None:
    """Copy all files below a folder, hidden ones too; of links, what they lead to."""
    for name in sorted(files_below(source, hidden=True)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
