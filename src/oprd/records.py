"""Files that survive a kill: JSON replaced in one stroke, JSON lines read up to the last whole one. Standard library only."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on files


def as_json(value: Any, what: str) -> str:
    """The value as JSON text; ``what`` names it in the error.

    Raises:
        ValueError: NaN, infinity, or something else that JSON does not have.
    """
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{what} cannot be written as JSON ({error}). Use plain values, None for no number."
        ) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """`write_text` of a value as JSON.

    Raises:
        ValueError: as of `as_json`; the old file stays.
    """
    write_text(path, as_json(value, str(path)))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file such that a reader, or whoever comes after a crash, finds the old one or the new one, whole."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        told = f"{path}: {os.strerror(error.errno)}. Free some room there; what it held before is untouched"
        raise OSError(error.errno, told) from error
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def check_folder(directory: str | os.PathLike, called: str, needed: int = 0) -> None:
    """A folder can be made and written to, and has room for ``needed`` bytes. Leaves nothing behind.

    Args:
        called: the setting that names it, for messages.

    Raises:
        ValueError: a file in the way, no permission, or a disk that is too full.
    """
    folder = Path(directory).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{called} {directory} cannot be a folder: {folder} is a file. Choose another {called}.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{called} {directory} cannot be written to: {folder} ({error.strerror}). Choose another {called}, or mend its "
            "permissions or disk."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{called} {directory}: the disk of {folder} has {free / 1e9:.2f} GB left, and {needed / 1e9:.2f} GB are needed at "
            f"least. Free some, or choose another {called}."
        )


def sync(*paths: Path) -> None:
    """Have files, and the names in folders, reach the disk; some file systems know no such thing for a folder."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if not path.is_dir():
                raise
        finally:
            os.close(handle)


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
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}). Restore the file.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}). Restore the file.") from error


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
