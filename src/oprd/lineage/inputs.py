"""What went into a run, by content: models, a bridge, data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.models import resolve_path


def model_record(name: str, revision: str | None = None) -> dict[str, Any]:
    """Name, the Hub's commit (None for a folder), and content: ``hash`` covers every file that defines the model.

    A Hub model that is not in the cache yet is fetched.
    """
    folder = Path(resolve_path(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.py"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    files = folder_hashes(folder)
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {"name": name, "revision": commit, "hash": combined_hash(files), "files": files}


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
        if (folder.parent / "manifest.json").exists():
            return folder.parent
    return None
