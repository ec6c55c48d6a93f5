"""A recipe as a file: YAML that can be read, keys that exist, values of the right kind."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from oprd.yaml_file import read_yaml

KEYS_ARE_LISTED = "oprd train --help lists the keys; those of trl.DistillationConfig and trl.ModelConfig work too."
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}
ALSO = {  # besides what their type says, since a recipe reads better so
    "layers": {int, list},
    "attention_layers": {int, list},
    "layer_map": {list},
    "bridge_rank": {int},
    "test_benchmarks": {list},
    "tools": {list},
    "resume_from_checkpoint": {bool},
    "fsdp": {bool, list},
}


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe.

    Raises:
        ValueError: not YAML, or anything but a mapping.
    """
    settings = read_yaml(path, "The recipe")
    if not isinstance(settings, dict):
        found = "is empty" if settings is None else f"holds a {type(settings).__name__}"
        raise ValueError(f"The recipe {path} {found}; it must be a mapping of settings, such as learning_rate: 1.0e-5.")
    return settings


def check_keys(where: str, settings: Mapping[str, Any], known: Iterable[str]) -> None:
    """Every key is a setting.

    Raises:
        ValueError: an unknown key, with the nearest known one.
    """
    known = set(known)
    for key in sorted(map(str, settings.keys() - known)):
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"{where}: unknown key {key!r}; {f'did you mean {near[0]}?' if near else KEYS_ARE_LISTED}")


def kinds_of(classes: Iterable[type]) -> dict[str, set[type]]:
    """The plain types that every field of these dataclasses takes; empty where any value may do."""
    found = {}
    for owner in classes:
        hints = typing.get_type_hints(owner)
        for item in dataclasses.fields(owner):
            found[item.name] = _plain(hints[item.name]) | ALSO.get(item.name, set())
    return found


def _plain(hint: Any) -> set[type]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_plain(part) for part in typing.get_args(hint)]
        return set().union(*parts) if all(parts) else set()
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    hint = origin or hint
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {str}
    return {hint} if hint in (*WORDS, type(None)) else set()


def check_values(where: str, settings: Mapping[str, Any], kinds: Mapping[str, set[type]]) -> None:
    """Every value is of a kind that its setting takes. Text is read as a number, as on the command line.

    Raises:
        ValueError: the setting, what it takes, and what it got.
    """
    for key, value in settings.items():
        taken = kinds.get(key)
        if taken and not _fits(value, taken):
            words = " or ".join(WORDS[kind] for kind in WORDS if kind in taken)
            hint = ""
            if isinstance(value, bool) and str in taken:
                hint = " (YAML reads a bare yes, no, on and off as true or false: put it in quotes)"
            got = "nothing" if value is None else repr(value)
            raise ValueError(f"{where}: {key} must be {words}, got {got}{hint}. Correct it, or remove the key.")


def _fits(value: Any, taken: set[type]) -> bool:
    if type(value) in taken or (type(value) is int and float in taken):
        return True
    if not isinstance(value, str):
        return False
    if {dict, list} & taken:
        return list in taken  # the libraries take one name for a list of one
    numbers = [kind for kind in (int, float) if kind in taken]
    for kind in numbers:
        try:
            kind(value)
            return True
        except ValueError:
            pass
    return bool in taken and value.lower() in ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")
