"""Bad input through the real door: what a user would type, and all that must hold when it is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from oprd.cli import main

SECONDS = 10.0
CODE_RAN = "code-ran"  # a file that bad input would write if its code were run


@dataclass
class Place:
    """A folder with everything that a run reads: models, prompts, problems, a recipe. A case spoils some of it."""

    root: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def write(self, name: str, content: str | bytes) -> Path:
        """A file, its folders made."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(self, *rows: Any, name: str = "prompts.jsonl") -> None:
        """Prompts, one JSON value a line."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def edit_json(self, name: str, **changes: Any) -> None:
        """Change keys of a JSON file; a value of None removes one."""
        content = json.loads((self.root / name).read_text()) | changes
        self.write(name, json.dumps({key: value for key, value in content.items() if value is not None}))

    def cut(self, name: str, share: float = 0.6) -> None:
        """Truncate a file."""
        content = (self.root / name).read_bytes()
        (self.root / name).write_bytes(content[: int(len(content) * share)])

    def remove(self, *names: str) -> None:
        """Files or folders that are not to be there."""
        for name in names:
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def payload(self) -> str:
        """Python that leaves a mark if it is ever run."""
        return f"open({str(self.root / CODE_RAN)!r}, 'w').write('ran')\n"


Arrange = Callable[[Place], Any]


@dataclass(frozen=True)
class Case:
    """One bad input: how it comes about, and what the one line on stderr must say.

    Attributes:
        name: the test's id.
        culprit: a regular expression for what is at fault (a file, a key, a row).
        remedy: one for what to change.
        arrange: spoils the place.
        settings: of the recipe, over the good ones; None removes a key.
        command: what is typed, ``{root}`` being the place; by default ``train --config {root}/recipe.yaml``.
        status: the exit code.
    """

    name: str
    culprit: str
    remedy: str
    arrange: Arrange | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ("train", "--config", "{root}/recipe.yaml")
    status: int = 1

    def prepare(self, place: Place) -> list[str]:
        """Spoil the place and write its recipe; the command line."""
        if self.arrange is not None:
            self.arrange(place)
        settings = place.settings | self.settings
        if not (place / "recipe.yaml").exists():
            place.write("recipe.yaml", yaml.safe_dump({k: v for k, v in settings.items() if v is not ABSENT}))
        return [part.format(root=place.root) for part in self.command]


ABSENT = object()


def cases(*rows: Case) -> Any:
    """``case`` as a parameter of a test, one for each row."""
    names = [row.name for row in rows]
    assert len(set(names)) == len(names), "two cases of one name"
    return pytest.mark.parametrize("case", rows, ids=names)


def snapshot(root: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its content, or where a link leads."""
    return {
        str(path.relative_to(root)): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if (path.is_file() or path.is_symlink()) and path.name != ".lock"  # which is empty, and stops nobody
    }


def error_line(stderr: str) -> str:
    """The one line that says what is wrong."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("oprd: error: ")]
    assert len(lines) == 1, stderr
    return lines[0].removesuffix("...").partition(" [oprd --traceback")[0]


def call(arguments: list[str], capfd: Any) -> tuple[int, str]:
    """The command in this process: its exit code and stderr."""
    capfd.readouterr()
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    return status, capfd.readouterr().err


def check_refused(case: Case, place: Place, capfd: Any) -> str:
    """Run a case and hold it to the rules; the line that was said."""
    arguments = case.prepare(place)
    before = snapshot(place.root)
    started = time.perf_counter()
    status, stderr = call(arguments, capfd)
    seconds = time.perf_counter() - started
    assert status == case.status, stderr or "nothing was said"
    said = error_line(stderr)
    assert re.search(case.culprit, said), f"does not name {case.culprit!r}: {said}"
    assert re.search(case.remedy, said), f"does not say {case.remedy!r}: {said}"
    assert seconds < SECONDS
    assert snapshot(place.root) == before, "files were written, changed or removed"
    assert not (place / CODE_RAN).exists()
    return said


# A greedy evaluation of the folder's student: the shortest command that loads a model.
EVAL = (
    "eval",
    "{root}/student",
    "--on",
    "{root}/problems.jsonl",
    "--out",
    "{root}/results",
    "--samples",
    "1",
    "--temperature",
    "0",
)
