"""What commands share: how results and events are shown."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import warnings
from itertools import pairwise
from typing import Any

from oprd.training.options import CHOICES, default_of
from oprd.training.shipped import find_recipe


def describe_settings(title: str, table: dict[str, str]) -> str:
    """A table of settings for ``--help``."""
    lines = [f"{title}:"]
    for name, text in table.items():
        choices = f" [{'|'.join(CHOICES[name])}]" if name in CHOICES else ""
        lines.append(f"  --{name}{choices}")
        default = f" (default:\N{NO-BREAK SPACE}{default_of(name)})" if default_of(name) else ""
        lines += textwrap.wrap(text + default, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def check_recipe_named(arguments: list[str]) -> None:
    """What a misspelt recipe would say after the imports, before them.

    Raises:
        ValueError: ``--config`` names no recipe.
    """
    names = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    names += [value for key, value in pairwise(arguments) if key == "--config"]
    for name in names:
        find_recipe(name)


def parse_json(option: str, text: str | None) -> dict[str, Any] | None:
    """The object that an option is given as.

    Raises:
        ValueError: not JSON, or not an object.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is not JSON ({error.msg}): {text}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, got {text}")
    return value


def show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A table on stdout, or JSON for machines."""
    from oprd.insight.tables import format_table

    print(json.dumps(rows, indent=2) if as_json else format_table(rows))


class _Lines(logging.StreamHandler):
    """Standard error, with a progress bar out of the way for as long as a line takes."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # nobody draws a bar before it is imported
        if tqdm is None or not tqdm.tqdm._instances:
            super().emit(record)
        else:
            tqdm.tqdm.write(self.format(record), file=self.stream)


def show_events() -> None:
    """One line per event of this project on stderr, once for all processes of a launch."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # for library authors, not for users of this command
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")  # the same

    def plain(record: logging.LogRecord) -> bool:  # accelerate marks its lines; only the first process speaks here
        record.msg = str(record.msg).removeprefix("[RANK 0] ")
        return True

    handler = _Lines()
    handler.addFilter(plain)
    handler.setFormatter(logging.Formatter("oprd: %(message)s"))
    events = logging.getLogger("oprd")
    events.handlers, events.propagate = [handler], False
    events.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
