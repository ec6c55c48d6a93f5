"""Which teachers there are, and which of them reads a row: one, several by name, or the student itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from oprd.bridge import Bridge
from oprd.training.objective import Objective
from oprd.training.pair import Pair
from oprd.training.teacher_settings import Rules, parse_teachers, rules_of


@dataclass(frozen=True)
class Teacher:
    """One teacher as the trainer uses it.

    Args:
        name: for the log, where there are several.
        weight: of its objective.
        model: as its engine wraps it; None for the student itself.
        at_hand: what must be open while it is asked.
        lend: what has its LM head, for the student's losses; asked for while it is at hand.
    """

    name: str | None
    weight: float
    pair: Pair
    objective: Objective
    model: nn.Module | None
    at_hand: Callable[[], AbstractContextManager[None]]
    lend: Callable[[], nn.Module]

    def among(self, student: nn.Module) -> nn.Module:
        """The module that is asked; ``student`` as its engine wraps it."""
        return student if self.model is None else self.model


@dataclass(frozen=True)
class Named:
    """One teacher as it is named: settings of a run with no other, what a trainer was given for it, and when it is asked."""

    name: str | None
    args: Any
    model: Any = None
    bridge: Bridge | str | None = None
    weight: float = 1.0
    when: Rules | None = None


def named_teachers(args: Any, model: Any = None, bridge: Any = None) -> list[Named]:
    """The teachers that settings name, with what a trainer was given for them.

    Args:
        args: `oprd.OPRDConfig`.
        model, bridge: of one teacher; or mappings by name, for several.

    Raises:
        ValueError: names that do not agree, or a teacher without a model.
    """
    if args.teachers is None and not isinstance(model, Mapping):
        args.refuse_ignored(True, "there are no teachers to choose from", teacher_column=None)
        return [Named(None, args, model, bridge)]
    if args.teacher_model_kind is not None:
        raise ValueError("teacher_model_kind makes the student its own teacher, and teachers names others. Remove one.")
    models: Mapping[str, Any] = model or {}
    if not isinstance(models, Mapping):
        raise ValueError("Two kinds of teachers: pass teacher_model as a mapping of names, or remove teachers.")
    settings = args.teachers or parse_teachers({name: {} for name in models})
    bridges: Mapping[str, Any] = bridge or {}
    if not isinstance(bridges, Mapping):
        raise ValueError("Several teachers have a bridge each: pass bridge as a mapping of the teachers' names.")
    for what, given in (("teacher_model", models), ("bridge", bridges)):
        if unknown := sorted(set(given) - set(settings)):
            raise ValueError(
                f"{what} has {unknown[0]!r}, which is no name among teachers ({', '.join(settings)}). Use the same names."
            )
    found = []
    for name, own in settings.items():
        if not (name in models or own.keys() & {"model_name_or_path", "url"}):
            raise ValueError(f"teachers: {name} has no model: set its model_name_or_path or url.")
        if name in bridges and "bridge" in own:
            raise ValueError(f"teachers: {name} has two bridges: pass one, or set one in its settings.")
        alone = copy.copy(args)
        alone.teachers = alone.teacher_column = None
        alone.teacher_model_name_or_path, alone.teacher_model_revision = (
            own.get(key) for key in ("model_name_or_path", "model_revision")
        )
        alone.teacher_url, alone.teacher_token_file = own.get("url"), own.get("token_file")
        alone.bridge = own.get("bridge")
        if alone.teacher_model_name_or_path is None and not isinstance(models.get(name), str):  # nothing is loaded here
            alone.teacher_model_init_kwargs = None
        rules = rules_of(f"teachers: {name}", own.get("when"))
        found.append(Named(name, alone, models.get(name), bridges.get(name), own.get("weight", 1.0), rules))
    return found


@dataclass(frozen=True)
class Routes:
    """Which teacher reads a row: by the name in ``column``, or the first whose rules all match (one without rules takes any).

    Raises:
        ValueError: both, or a teacher that would never be asked.
    """

    teachers: tuple[Named, ...]
    column: str | None

    def __post_init__(self) -> None:
        ruled = [teacher.when is not None for teacher in self.teachers]
        if self.column is not None and any(ruled):
            raise ValueError("teacher_column and the teachers' when both choose a teacher. Remove one.")
        if self.column is None and False in ruled[:-1]:
            raise ValueError(
                f"teachers: {self.teachers[ruled.index(False)].name} has no when and would take every row before those after it "
                "are asked. Give it one, or put it last."
            )

    @classmethod
    def of(cls, teachers: list[Named], column: str | None) -> Routes | None:
        """None where every teacher reads every row."""
        routed = column is not None or any(teacher.when is not None for teacher in teachers)
        return cls(tuple(teachers), column) if routed else None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are looked at."""
        if self.column is not None:
            return (self.column,)
        return tuple(dict.fromkeys(column for teacher in self.teachers for column in teacher.when or ()))

    def index(self, row: Mapping[str, Any]) -> int:
        """The place of its teacher.

        Raises:
            ValueError: none is named, or none's rules match.
        """
        names = [teacher.name for teacher in self.teachers]
        if self.column is not None:
            if row.get(self.column) not in names:
                raise ValueError(f"{self.column} is {row.get(self.column)!r}, which is none of {', '.join(names)}.")
            return names.index(row[self.column])
        for place, teacher in enumerate(self.teachers):
            if all(pattern.search(_text(row.get(column))) for column, pattern in (teacher.when or {}).items()):
                return place
        raise ValueError("no teacher's when matches. Let the last teacher have none, so that it takes the rest.")

    def check(self, rows: Any, where: str) -> None:
        """Every row of a dataset has its teacher.

        Raises:
            ValueError: a missing column, or the row (from 1); a teacher whom no training row asks.
        """
        known = getattr(rows, "column_names", None)
        missing = [column for column in self.columns if known is not None and column not in known]
        if missing:
            raise ValueError(
                f"{where} has no column {missing[0]!r}, by which teachers are chosen; it has {', '.join(known)}."
            )
        if not hasattr(rows, "__len__"):
            return
        asked = set()
        for number, row in enumerate(rows, 1):
            try:
                asked.add(self.index(row))
            except ValueError as error:
                raise ValueError(f"{where}, row {number}: {error}") from error
        idle = [teacher.name for place, teacher in enumerate(self.teachers) if place not in asked]
        if idle and where == "train_dataset":
            raise ValueError(f"No row of {where} asks {idle[0]}. Remove it from teachers, or correct the rows.")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(message["content"] for message in value)
    return "" if value is None else str(value)
