"""Prompts from the Hub or a file, in the layouts people have, checked row by row before anything runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from oprd.models import resolve_path

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "problem", "question")
ROLES = ("system", "user", "assistant", "tool", "developer")
FILE_KINDS = (".parquet", ".json", ".jsonl")


def _json_rows(path: Path) -> Iterable[tuple[str, Any]]:
    """Rows of a json list or of json lines, each with its place for messages."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text (byte {error.start}).") from error
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {error.lineno}: not valid JSON ({error.msg}).") from error
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}: not valid JSON ({error.msg}).") from error


def _rows(name: str, config: str | None, split: str) -> Iterable[tuple[str, Any]]:
    path = Path(resolve_path(name))
    if path.suffix.lower() in FILE_KINDS:
        if not path.is_file():
            raise ValueError(f"There is no file {path}. Give a parquet, json or jsonl file, or a Hub dataset id.")
        if path.suffix.lower() != ".parquet":
            return _json_rows(path)
        dataset = Dataset.from_parquet(str(path), keep_in_memory=True)
    elif path.exists():
        raise ValueError(f"{path} is not a {', '.join(FILE_KINDS)} file.")
    else:
        dataset = load_dataset(name, config, split=split)
    return ((f"row {number}", row) for number, row in enumerate(dataset, 1))


def _prompt_fault(prompt: Any) -> str | None:
    """What is wrong with a prompt, or None."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "the prompt is empty"
    if not isinstance(prompt, list) or not prompt:
        return f"the prompt must be text or a list of chat messages, got {type(prompt).__name__}"
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return "a chat message must be {role, content} with text content"
        if message.get("role") not in ROLES:
            return f"unknown role {message.get('role')!r}; roles are {', '.join(ROLES)}"
    if prompt[-1]["role"] == "assistant":
        return "the last message is the assistant's, so there is nothing to answer"
    return None if any(message["content"].strip() for message in prompt) else "every message is empty"


def _answer(row: dict[str, Any], column: str | None) -> Any:
    if column is not None:
        return row[column]
    if isinstance(row.get("reward_model"), dict) and row["reward_model"].get("ground_truth") is not None:
        return row["reward_model"]["ground_truth"]
    return row.get("answer")


def load_prompts(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    as_chat: bool = False,
    drop_duplicates: bool = False,
) -> Dataset:
    """Prompts as a dataset with ``prompt`` (text or chat messages) and, where every row has one, ``answer`` (text).

    Args:
        name: Hub id, or a ``.parquet``, ``.json`` or ``.jsonl`` file.
        prompt_column, answer_column: found by themselves in the common layouts: ``prompt`` (with
            ``reward_model.ground_truth``), ``problem``/``answer``, ``question``/``answer``.
        as_chat: make text prompts one user message each.
        drop_duplicates: keep the first row of each prompt, and say how many went.

    Raises:
        ValueError: no rows, no prompt column, or a bad row, which is named with its number (counting from 1).
    """
    kept: list[dict[str, Any]] = []
    seen: set[str] = set()
    repeated = 0
    for place, row in _rows(name, config, split):
        if not isinstance(row, dict):
            raise ValueError(f"{name}, {place}: expected an object with columns, got {type(row).__name__}.")
        column = prompt_column or next((c for c in PROMPT_COLUMNS if c in row), None)
        if column is None or column not in row:
            wanted = (
                f"column {prompt_column!r}" if prompt_column else f"none of the columns {', '.join(PROMPT_COLUMNS)}"
            )
            missing = "has no" if prompt_column else "has"
            raise ValueError(f"{name}, {place}: {missing} {wanted}; it has {', '.join(row)}. Set prompt_column.")
        if answer_column is not None and answer_column not in row:
            raise ValueError(f"{name}, {place}: has no column {answer_column!r}; it has {', '.join(row)}.")
        fault = _prompt_fault(row[column])
        if fault:
            raise ValueError(f"{name}, {place}: {fault}.")
        if drop_duplicates:
            fingerprint = json.dumps(row[column], sort_keys=True)
            if fingerprint in seen:
                repeated += 1
                continue
            seen.add(fingerprint)
        prompt, answer = row[column], _answer(row, answer_column)
        if as_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        kept.append({"prompt": prompt, "answer": None if answer is None else str(answer), "_place": place})
    if repeated:
        logger.info(f"{name}: dropped {repeated} rows whose prompt had come before; {len(kept)} are left.")
    return _as_dataset(name, kept)


def _as_dataset(name: str, rows: list[dict[str, Any]]) -> Dataset:
    if not rows:
        raise ValueError(f"{name} has no rows.")
    is_text = isinstance(rows[0]["prompt"], str)
    odd = next((row for row in rows if isinstance(row["prompt"], str) != is_text), None)
    if odd:
        raise ValueError(
            f"{name}, {odd['_place']}: text and chat prompts are mixed. Use one kind, or set as_chat: true."
        )
    columns = {"prompt": [row["prompt"] for row in rows]}
    if not is_text:  # one schema for every message
        columns["prompt"] = [[{"role": m["role"], "content": m["content"]} for m in p] for p in columns["prompt"]]
    if all(row["answer"] is not None for row in rows):
        columns["answer"] = [row["answer"] for row in rows]
    return Dataset.from_dict(columns)
