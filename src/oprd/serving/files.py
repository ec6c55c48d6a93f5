"""The small files beside a teacher's weights that pre-flight reads: which, from where, and into which folder.

Both ends hold the same list of names, so nothing else leaves the one and nothing else is written by the other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

NAMES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
    }
)
MOST_BYTES = 64 * 2**20  # of one file; the largest tokenizers have about 40 MB


def read_files(model: str, revision: str | None) -> dict[str, bytes]:
    """Every file of the list that a folder, or a model of the Hub, has.

    Raises:
        ValueError: a file beyond `MOST_BYTES`.
    """
    from transformers.utils import cached_file

    found = {}
    for name in sorted(NAMES):
        if Path(model).is_dir():
            path = Path(model) / name
        else:
            place = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            path = None if place is None else Path(place)
        if path is None or not path.is_file():
            continue
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{name} of {model} has more than {MOST_BYTES:,} bytes.")
        found[name] = path.read_bytes()
    return found


def check_names(names: object) -> list[str]:
    """File names as a service lists them, if they are all of the list.

    Raises:
        ValueError: another name, such as one that leads out of a folder.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) and name in NAMES for name in names):
        raise ValueError("The service lists files that no tokenizer or config has.")
    return names


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """sha256 of each file."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
