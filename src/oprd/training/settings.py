"""What a recipe and the command line say, and every setting that follows from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from oprd.training.options import HELP
from oprd.training.recipe import SECRETS, parse
from oprd.training.recipe_file import read_recipe
from oprd.training.shipped import find_recipe

TITLES = ("data", "", "model", "bridge", "benchmarks")  # of the parts of Configs; the second one has two titles


def spoken(arguments: list[str]) -> dict[str, Any]:
    """What the recipe and the command line say, as it stands there."""
    said: dict[str, Any] = {}
    if "--config" in arguments[:-1]:
        said = read_recipe(find_recipe(arguments[arguments.index("--config") + 1]))
    pairs = zip(arguments, [*arguments[1:], "true"], strict=True)
    said |= {key[2:]: yaml.safe_load(value) for key, value in pairs if key.startswith("--")}
    said.pop("config", None)
    return said


def every_setting(arguments: list[str]) -> dict[str, dict[str, Any]]:
    """By group, every setting with the value that ``oprd train`` would use, defaults too; tokens are left out.

    Nothing but the recipe is looked at, so what a GPU or the models decide (``bf16``, an open ``logit_weight``) is None.

    Raises:
        ValueError: whatever is wrong with the recipe, as far as it can be known without models and data.
    """
    said = spoken(arguments)
    configs = parse([*arguments, "--use_cpu", "true"])  # the recipe may be for a GPU that this machine lacks
    known = {name: said.get(name) for name in ("use_cpu", "bf16")} | {"use_cpu": said.get("use_cpu", False)}
    groups: dict[str, dict[str, Any]] = {"objective": {}, **{title: {} for title in TITLES if title}, "training": {}}
    for title, config in zip(TITLES, configs, strict=True):
        for item in dataclasses.fields(config):
            if item.name in SECRETS:
                continue
            value = _plain(known.get(item.name, getattr(config, item.name)))
            groups[title or ("objective" if item.name in HELP else "training")][item.name] = value
    return groups


def _plain(value: Any) -> Any:
    value = value.value if hasattr(value, "value") else value
    value = value.to_dict() if hasattr(value, "to_dict") else value
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items() if key not in SECRETS}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
