"""``oprd recipes`` and ``oprd show``: what ships with oprd, and one of them as a file to start from."""

from __future__ import annotations

import argparse
import json
import textwrap

from oprd.commands.shared import show_events
from oprd.training.shipped import about, find_recipe, shipped


def add_recipes(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes that ship with oprd",
        description="List the recipes that ship with oprd: what each is for, its student and teacher, and what it minimises. "
        "oprd show NAME > my.yaml is how one starts a recipe of one's own.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run_command=run_recipes)


def run_recipes(options: argparse.Namespace) -> int:
    """A few lines a recipe: a table of them would be wider than most screens."""
    found = [about(path) for path in shipped().values()]
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for one in found:
        print(one["name"])
        print(textwrap.fill(one["purpose"], 100, initial_indent="    ", subsequent_indent="    "))
        for name in ("student", "teacher", "objective"):
            print(f"    {name:<9}  {one[name]}")
        print()
    print("oprd show NAME prints one; oprd show NAME > my.yaml starts your own.")
    return 0


def add_show(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "show",
        help="print a recipe, or every setting that follows from it",
        usage="oprd show NAME [--resolved [--key value ...]] [--json]",
        description="Print a recipe as it ships with oprd: oprd show miniature > my.yaml starts your own. With --resolved every "
        "setting with the value that oprd train would use, defaults too; keys after it win over the recipe, as in training. "
        "What the GPU or the models decide is null there.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="NAME", help="a recipe that ships with oprd (oprd recipes), or a YAML file")
    parser.add_argument("--resolved", action="store_true", help="every setting with its value, by group")
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    parser.set_defaults(run_command=run_show, keys_after=True)  # the recipe parser reads them


def run_show(options: argparse.Namespace) -> int:
    """The file as it is, or what follows from it."""
    import yaml

    from oprd.training.recipe_file import read_recipe

    path = find_recipe(options.recipe)
    if not options.resolved:
        if options.keys:
            raise ValueError(f"{options.keys[0]} would be ignored: a recipe is shown as it is. Add --resolved.")
        settings = read_recipe(path)  # so that a broken file is told
        print(json.dumps(settings, indent=2) if options.json else path.read_text(encoding="utf-8").rstrip("\n"))
        return 0
    show_events()
    from oprd.training.settings import every_setting, spoken

    arguments = ["--config", str(path), *options.keys]
    groups, said = every_setting(arguments), spoken(arguments)
    if options.json:
        print(json.dumps(groups, indent=2))
        return 0
    for title, settings in groups.items():
        print(f"# {title}")
        for key, value in settings.items():
            told = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
            told = told.removesuffix("...\n").strip()
            print(f"{key}: {told}" if key in said else f"{key}: {told}  # default")
        print()
    return 0
