"""Problem sets by name, from the Hub or from a file, as prompts that a model can read."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd.prompts import FILE_KINDS, PromptRow, as_messages, check_kind, odd_kind, read_prompts

logger = logging.getLogger(__name__)

SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
FORMATS = ("auto", "chat", "text")
FINISHED = "prompt"  # a column of this name holds finished prompts, any other bare problem statements

NAMED: dict[str, dict[str, str]] = {
    "aime24": {"name": "HuggingFaceH4/aime_2024", "split": "train"},
    "aime25": {"name": "math-ai/aime25", "split": "test"},
    "aimo": {"name": "AI-MO/aimo-validation-amc", "split": "train"},
    "math500": {"name": "HuggingFaceH4/MATH-500", "split": "test"},
    "gsm8k": {"name": "openai/gsm8k", "config": "main", "split": "test"},
}
ALIASES = {"aime2024": "aime24", "aime2025": "aime25", "amc": "aimo"}


@dataclass(frozen=True)
class Problem:
    """One problem. ``id`` is a hash of its statement and answer, the same whatever the suffix or the format."""

    id: str
    prompt: str | list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """Problems under a short name, and how their prompts are written: ``format`` is chat or text."""

    name: str
    source: str
    problems: tuple[Problem, ...]
    format: str

    @property
    def hash(self) -> str:
        """One hash of all problems as they are asked, in order: the instruction and the format count."""
        asked = json.dumps([[problem.id, problem.prompt] for problem in self.problems], ensure_ascii=False)
        return hashlib.sha256(asked.encode()).hexdigest()


def statement_of(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt without roles and without the instruction to box the answer."""
    text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
    return text.replace(SUFFIX, "").replace(SUFFIX.replace("{}", "{{}}"), "").strip()


def problem_id(prompt: str | list[dict[str, str]], answer: str) -> str:
    """16 hex digits of the statement and the answer."""
    return hashlib.sha256(f"{statement_of(prompt)}\0{answer.strip()}".encode()).hexdigest()[:16]


def add_suffix(prompt: str | list[dict[str, str]], suffix: str) -> str | list[dict[str, str]]:
    """The prompt with the instruction at the end of its last message, unless it is there already.

    An instruction to box the answer counts as there wherever the prompt says ``\\boxed``.
    """
    said = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if any(suffix in text or ("\\boxed" in suffix and "\\boxed" in text) for text in said):
        return prompt
    text = f"{said[-1].rstrip()} {suffix}"
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def _source(name: str, split: str | None) -> tuple[str, dict[str, str]]:
    """Short name, and what `read_prompts` needs."""
    key = name.lower().replace("-", "").replace("_", "")
    key = ALIASES.get(key, key)
    if Path(name).suffix.lower() in FILE_KINDS:
        if split is not None:
            raise ValueError(f"split={split} would be ignored: {name} is a file.")
        return Path(name).stem.removeprefix("miniature:"), {"name": name}
    check_kind(Path(name))
    if key in NAMED:
        return key, NAMED[key] | ({} if split is None else {"split": split})
    if "/" not in name:
        raise ValueError(
            f"There is no benchmark {name!r}: give {', '.join(NAMED)}, a {', '.join(FILE_KINDS)} file or a Hub id."
        )
    for short, source in NAMED.items():
        if source["name"] == name:  # with its configuration
            return short, source | ({} if split is None else {"split": split})
    return name.rsplit("/", 1)[1], {"name": name, "split": split or "test"}


def _format(rows: Sequence[PromptRow], wanted: str, has_template: bool, name: str) -> str:
    """chat or text. ``auto``: chat messages and bare statements become chat where the model has a template for it."""
    if wanted == "chat" and not has_template:
        raise ValueError(
            "prompt_format: chat needs a chat template, and the model's tokenizer has none. Use prompt_format: text or auto."
        )
    if wanted != "auto":
        return wanted
    is_text = isinstance(rows[0].prompt, str)
    if is_text and rows[0].column == FINISHED:
        return "text"
    if not has_template and not is_text:
        logger.info(f"{name}: the tokenizer has no chat template, so messages are read as plain text.")
    return "chat" if has_template else "text"


def load_benchmark(
    name: str,
    *,
    has_template: bool,
    prompt_format: str = "auto",
    suffix: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    **columns: Any,
) -> Benchmark:
    """A named benchmark, a file or a Hub dataset as prompts for a model.

    Args:
        has_template: whether the model's tokenizer has a chat template.
        prompt_format: ``chat``, ``text``, or ``auto``: as the rows are, bare statements as chat where there is a template.
        suffix: instruction added where missing. By default `SUFFIX`, except for text in a ``prompt`` column, which is
            taken as it is; an empty one adds nothing.
        limit: the first so many problems only.
        columns: ``prompt_column``, ``answer_column``.

    Raises:
        ValueError: an unknown name; a row without an answer, named by its place; text and chat mixed.
    """
    if prompt_format not in FORMATS:
        raise ValueError(f"prompt_format must be one of {', '.join(FORMATS)}, got {prompt_format!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    short, source = _source(name, split)
    if not re.fullmatch(r"\w[\w.+ -]*", short):  # results go to a folder of this name
        raise ValueError(
            f"The benchmark {name} would be called {short!r}. Rename it: letters, digits, '.', '-' and '_'."
        )
    rows = read_prompts(**source, drop_duplicates=True, **columns)[:limit]
    for row in rows:
        if not (row.answer or "").strip():
            raise ValueError(
                f"{name}, {row.place}: no answer to grade against. Fill or remove the row, or set answer_column."
            )
    odd = odd_kind(rows)
    if odd:
        raise ValueError(f"{name}, {odd.place}: text and chat prompts are mixed. Use one kind.")
    form = _format(rows, prompt_format, has_template, name)
    problems: dict[str, Problem] = {}  # by id: prompts may differ in the instruction alone
    for row in rows:
        prompt = row.prompt
        verbatim = isinstance(prompt, str) and row.column == FINISHED
        wanted = ("" if verbatim else SUFFIX) if suffix is None else suffix
        prompt = add_suffix(prompt, wanted) if wanted else prompt
        if form == "chat":
            prompt = as_messages(prompt)
        elif not isinstance(prompt, str):
            prompt = "\n\n".join(message["content"] for message in prompt)
        problem = Problem(problem_id(row.prompt, row.answer), prompt, row.answer)
        problems.setdefault(problem.id, problem)
    return Benchmark(short, source["name"], tuple(problems.values()), form)
