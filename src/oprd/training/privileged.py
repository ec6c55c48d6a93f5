"""A teacher's prompt made of the student's and of columns that the student does not see: a solution, a hint, feedback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any

from oprd.prompts import Prompt

PROMPT = "prompt"


@dataclass(frozen=True)
class PromptTemplate:
    """Text with ``{prompt}`` and ``{column}`` in it; of chat messages the last user message is the prompt.

    Raises:
        ValueError: no ``{prompt}``, or a placeholder that is no column's name.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"teacher_prompt_template: {error}. {BRACES}") from error
        for _, name, specification, conversion in parts:
            if name is not None and (not name.isidentifier() or specification or conversion):
                raise ValueError(f"teacher_prompt_template: {{{name}}} is not the name of a column. {BRACES}")
        if PROMPT not in {name for _, name, _, _ in parts}:
            raise ValueError(
                "teacher_prompt_template has no {prompt}: it stands for the student's prompt, which the teacher must read too."
            )

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold privileged text, in order."""
        names = [name for _, name, _, _ in Formatter().parse(self.text) if name not in (None, PROMPT)]
        return tuple(dict.fromkeys(names))

    def check(self, rows: Any, where: str) -> None:
        """Every row has what the template asks for.

        Args:
            rows: a dataset, or None for one whose rows come as they come.

        Raises:
            ValueError: a missing column, or a row (from 1) without text in it.
        """
        known = getattr(rows, "column_names", None)
        missing = [name for name in self.columns if known is not None and name not in known]
        if missing:
            raise ValueError(
                f"{where} has no column {missing[0]!r}, which teacher_prompt_template asks for; it has {', '.join(known)}."
            )
        for name in self.columns if hasattr(rows, "__len__") else ():
            for number, value in enumerate(rows[name], 1):
                if value is None or not str(value).strip():
                    raise ValueError(
                        f"{where}, row {number}: {name} is empty, so the teacher would know no more than the student. Fill it "
                        "in, or remove the row."
                    )
        for number, prompt in enumerate(rows[PROMPT] if hasattr(rows, "__len__") else (), 1):
            if isinstance(prompt, list) and not any(message["role"] == "user" for message in prompt):
                raise ValueError(f"{where}, row {number}: no user message, which teacher_prompt_template would fill.")

    def fill(self, row: Mapping[str, Any], limit: int | None = None) -> Prompt:
        """The teacher's prompt for a row; of every column at most the first ``limit`` characters."""
        values = {name: str(row[name])[:limit] for name in self.columns}
        prompt = row[PROMPT]
        if isinstance(prompt, str):
            return self.text.format(prompt=prompt, **values)
        last = max(place for place, message in enumerate(prompt) if message["role"] == "user")
        filled = self.text.format(prompt=prompt[last]["content"], **values)
        return [*prompt[:last], {**prompt[last], "content": filled}, *prompt[last + 1 :]]

    def fit(
        self, row: Mapping[str, Any], encode: Callable[[Prompt], list[int]], room: int | None
    ) -> tuple[list[int], int]:
        """The teacher's prompt in at most ``room`` tokens: privileged text loses its end, and nothing else anything.

        Args:
            encode: from a prompt to tokens.
            room: None for as much as there is.

        Returns:
            The tokens, and how many characters of privileged text were left out. With no privileged text at all the prompt may
            still be longer than ``room``; that is the caller's to refuse.
        """
        ids = encode(self.fill(row))
        if room is None or len(ids) <= room:
            return ids, 0
        lengths = [len(str(row[name])) for name in self.columns]
        kept, too_many = 0, max(lengths, default=0)
        ids = encode(self.fill(row, 0))
        while too_many - kept > 1:
            middle = (kept + too_many) // 2
            tried = encode(self.fill(row, middle))
            kept, too_many, ids = (middle, too_many, tried) if len(tried) <= room else (kept, middle, ids)
        return ids, sum(max(length - kept, 0) for length in lengths)


BRACES = (
    "Placeholders are {prompt} and names of columns, such as {solution}; write braces of the text twice: {{ and }}."
)
