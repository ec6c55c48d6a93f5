"""The recipes that ship with oprd, by name and in a few words. Nothing heavy is imported, so that listing them is quick."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from oprd.training.recipe_file import read_recipe

FOLDER = Path(__file__).parent.parent / "recipes"


def shipped() -> dict[str, Path]:
    """Name and file of every recipe of the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str) -> Path:
    """A path as given, or a recipe of the package by its name (``miniature`` or ``miniature.yaml``).

    Raises:
        ValueError: neither; with the names that are close.
    """
    path, known = Path(name), shipped()
    if path.exists():
        return path
    if path.parent == Path(".") and path.name.removesuffix(".yaml") in known:
        return known[path.name.removesuffix(".yaml")]
    near = difflib.get_close_matches(path.stem, known, n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(
        f"There is no recipe {name}{meant} Give a YAML file, or one that ships with oprd: {', '.join(known)}."
    )


def about(path: Path) -> dict[str, str]:
    """Name, purpose (the first sentence of the header), student, teacher and objective of a recipe."""
    settings = read_recipe(path)
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):  # a command, or the first setting
            break
        comments.append(line[2:])
    teachers = (settings.get("teachers") or {}).values()
    own = settings.get("teacher_model_kind")
    teacher = settings.get("teacher_model_name_or_path") or settings.get("teacher_url") or ""
    return {
        "name": path.stem,
        "purpose": first_sentence(" ".join(comments)),
        "student": str(settings.get("model_name_or_path", "")),
        "teacher": " and ".join(str(t.get("model_name_or_path", t.get("url"))) for t in teachers)
        or (f"itself ({own})" if own else str(teacher)),
        "objective": objective(settings),
    }


def first_sentence(text: str) -> str:
    """Up to the first full stop that another sentence follows (so not ``Eq. 3``)."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0]


def objective(settings: dict[str, Any]) -> str:
    """What a recipe minimises, in a few words; with ``then`` both stages."""
    weights = {"representation_weight": 1.0, "output_weight": 1.0, "logit_weight": None}
    states, output, logits = (settings.get(name, default) for name, default in weights.items())
    terms = []
    if states:
        through = " through a bridge" if settings.get("bridge") else ""
        terms.append(f"{'' if states == 1 else f'{states:g} x '}hidden states{through}")
    kind = settings.get("output_loss", "none")
    names = {
        "sampled": "sampled token",
        "top_k": f"top-{settings.get('output_top_k', 16)} tokens",
        "full": "all next tokens",
    }
    if kind in names:
        terms.append(f"{'' if output == 1 else f'{output:g} x '}{names[kind]}")
    if logits:
        terms.append("logits")
    told = " + ".join(terms)
    later = settings.get("then")
    return f"{told}, then {objective({**settings, 'bridge': None, **later, 'then': None})}" if later else told
