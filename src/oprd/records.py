"""Files that survive a kill: JSON replaced in one stroke, JSON lines read up to the last whole one. Standard library only."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` in one stroke: readers see the old file or the new one, never half of one. No NaN."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> Any:
    """The value.

    Raises:
        ValueError: no such file, or not JSON; the place is named.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no {path}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error


def whole_lines(path: Path) -> list[tuple[Any, int]]:
    """Every line's value with the byte offset behind it; a last line that a kill cut short is passed over.

    Raises:
        ValueError: a line that is not the last is not JSON.
    """
    if not Path(path).exists():
        return []
    content = Path(path).read_bytes()
    rows, end = [], 0
    *lines, rest = content.split(b"\n")  # what follows the last newline is no whole line
    for number, line in enumerate(lines, 1):
        end += len(line) + 1
        try:
            rows.append((json.loads(line), end))
        except ValueError as error:
            if number < len(lines) or rest:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
    return rows
