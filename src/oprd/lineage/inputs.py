"""What went into a run, by content: models, a bridge, data."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.models import resolve_path

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.py"]
OF_A_RUN = re.compile(r"final|best(-step-\d+)?|checkpoint-\d+")  # folders of a run that hold a model


def model_record(name: str, revision: str | None = None) -> dict[str, Any]:
    """Name, the Hub's commit (None for a folder), and content: ``hash`` covers every file that defines the model.

    A Hub model that is not in the cache yet is fetched. Of its files those of `HUB_FILES` count (``*.bin`` too, where the
    weights are not safetensors), whatever else is in the cache.

    Raises:
        ValueError: neither a folder nor a model that the Hub gives.
    """
    folder = Path(resolve_path(name))
    if folder.is_dir():
        files = folder_hashes(folder)
    else:
        patterns = list(HUB_FILES)
        folder = _from_hub(name, revision, patterns)
        if not any(folder.rglob("*.safetensors")):
            patterns.append("*.bin")
            folder = _from_hub(name, revision, patterns)
        files = folder_hashes(folder)
        files = {file: digest for file, digest in files.items() if any(fnmatch(file, p) for p in patterns)}
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {"name": name, "revision": commit, "hash": combined_hash(files), "files": files}


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name} is no folder here, and the Hub has not given it: {reason}") from error


def data_record(name: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Name, number and content of the rows that a run read, whatever file or Hub they came from."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        count += 1
    return {"name": name, "rows": count, "hash": digest.hexdigest()}


def run_of_model(name: str) -> Path | None:
    """The run directory that made a local model (``RUN/final``, ``RUN/best``, ``RUN/checkpoint-N``), or None."""
    path = Path(name)
    if not path.is_dir():
        return None
    for folder in (path.absolute(), path.resolve()):
        if OF_A_RUN.fullmatch(folder.name) and (folder.parent / "manifest.json").exists():
            return folder.parent
    return None
