"""Prompts from the Hub or a file, in the layouts people have, checked row by row before anything runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Json, Value, load_dataset
from pyarrow import parquet

from oprd.models import resolve_path

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, str]]  # text, or chat messages

PROMPT_COLUMNS = ("prompt", "problem", "question")
ROLES = ("system", "user", "assistant", "tool", "developer")
FILE_KINDS = (".parquet", ".json", ".jsonl")
ARCHIVE = "It is an archive: unpack it, and name the file inside."
PICKLE = "It may be a pickle, which runs code when it is read: write its rows as jsonl."
TABLE = "Convert it: one JSON object a line, with a column prompt."
OTHER_KINDS = (
    dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z"), ARCHIVE)
    | dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz"), PICKLE)
    | dict.fromkeys((".csv", ".tsv", ".txt", ".xlsx", ".yaml", ".arrow"), TABLE)
)
NOT_JSON = "not valid JSON"


def _json_rows(path: Path) -> Iterable[tuple[str, Any]]:
    """Rows of a json list or of json lines, each with its place for messages."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {error.lineno}: {NOT_JSON} ({error.msg}).") from error
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path.name}, line {number}: {NOT_JSON} ({error.msg}). Mend or remove the line; a file holds an object a line, "
                "or one list of rows in .json."
            ) from error
        except RecursionError as error:
            raise ValueError(
                f"{path.name}, line {number}: nested too deep to read. Mend or remove the line."
            ) from error


def check_kind(path: Path) -> None:
    """Not a kind of file that could be taken for data, but is not read.

    Raises:
        ValueError: with how to make one that is.
    """
    if remedy := OTHER_KINDS.get(path.suffix.lower()):
        raise ValueError(f"{path} is not a {', '.join(FILE_KINDS)} file. {remedy}")


def _rows(name: str, config: str | None, split: str) -> Iterable[tuple[str, Any]]:
    path = Path(resolve_path(name))
    if path.suffix.lower() in FILE_KINDS:
        if not path.is_file():
            raise ValueError(f"There is no file {path}. Give a parquet, json or jsonl file, or a Hub dataset id.")
        return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)
    check_kind(path)
    if path.exists():
        raise ValueError(f"{path} is not a {', '.join(FILE_KINDS)} file. Name one.")
    try:
        dataset = load_dataset(name, config, split=split)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} is no file here, and the Hub has not given it: {reason} Name a {', '.join(FILE_KINDS)} file, or a Hub "
            "dataset that this machine can reach."
        ) from error
    return ((f"row {number}", row) for number, row in enumerate(dataset, 1))


def _parquet_rows(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} is truncated or no parquet file ({error}). Copy or write it again.") from error
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _prompt_fault(prompt: Any) -> str | None:
    """What is wrong with a prompt, or None."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "the prompt is empty"
    if not isinstance(prompt, list) or not prompt:
        return f"the prompt must be text or a list of chat messages, got {type(prompt).__name__}"
    for message in prompt:
        calls = isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls")
        is_call_alone = calls and message.get("content") is None
        if not isinstance(message, dict) or not (is_call_alone or isinstance(message.get("content"), str)):
            return "a chat message must be {role, content} with text content"
        if message.get("role") not in ROLES:
            return f"unknown role {message.get('role')!r}; roles are {', '.join(ROLES)}"
        if calls and not (isinstance(calls, list) and all(_call(call) for call in calls)):
            return "tool_calls must be a list of {type, function: {name, arguments}}, with arguments as a mapping or its JSON"
    if prompt[-1]["role"] == "assistant":
        return "the last message is the assistant's, so there is nothing to answer"
    return None if any((message["content"] or "").strip() for message in prompt) else "every message is empty"


def _call(call: Any) -> dict[str, Any] | None:
    """A call as chat templates read it: ``arguments`` as a mapping; None for what is no call."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict | None):
        return None
    told = {key: call[key] for key in ("id",) if call.get(key)}
    return {**told, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """What templates read of a checked message: role, content, an assistant's calls, and which of them a tool answers."""
    kept = {"role": message["role"], "content": message["content"] or ""}
    if kept["role"] == "assistant" and message.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    if kept["role"] == "tool":
        kept |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    return kept


WORKED_ANSWER = "####"  # GSM8K: the solution, then the answer behind this mark


def _answer(row: dict[str, Any], column: str | None, where: str) -> str | None:
    """Raises ValueError for what no answer can be, such as a list."""
    if column is not None:
        answer = row[column]
    elif isinstance(row.get("reward_model"), dict) and row["reward_model"].get("ground_truth") is not None:
        answer = row["reward_model"]["ground_truth"]
    else:
        answer = row.get("answer")
    if answer is not None and not isinstance(answer, str | int | float | Decimal):
        raise ValueError(
            f"{where}: the answer must be text or a number, got {type(answer).__name__}. Set answer_column."
        )
    return None if answer is None else str(answer).rpartition(WORKED_ANSWER)[2].strip()


def _text(row: dict[str, Any], column: str, where: str) -> str:
    """Of a column that a setting names, as text."""
    if column not in row:
        raise ValueError(f"{where}: has no column {column!r}; it has {', '.join(row)}.")
    value = row[column]
    if not isinstance(value, str | int | float | Decimal) or not str(value).strip():
        kind = "nothing" if value is None or isinstance(value, str) else type(value).__name__
        raise ValueError(f"{where}: {column} must be text or a number, got {kind}. Correct or remove the row.")
    return str(value)


@dataclass(frozen=True)
class PromptRow:
    """One row: its place for messages, the column that its prompt came from, text or chat messages, the answer, and other
    columns that were asked for."""

    place: str
    column: str
    prompt: Prompt
    answer: str | None
    others: dict[str, str] = field(default_factory=dict)


def read_prompts(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    columns: Sequence[str] = (),
    drop_duplicates: bool = False,
) -> list[PromptRow]:
    """The rows behind `load_prompts`, which says what the arguments mean and what is refused."""
    kept: list[PromptRow] = []
    seen: set[str] = set()
    repeated = 0
    for place, row in _rows(name, config, split):
        if not isinstance(row, dict):
            raise ValueError(
                f"{name}, {place}: expected an object with columns, got {type(row).__name__}. Correct or remove the row."
            )
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
            raise ValueError(f"{name}, {place}: {fault}. Correct or remove the row.")
        if drop_duplicates:
            fingerprint = json.dumps(row[column], sort_keys=True)
            if fingerprint in seen:
                repeated += 1
                continue
            seen.add(fingerprint)
        prompt = row[column]
        if isinstance(prompt, list):
            prompt = [_message(message) for message in prompt]
        answer = _answer(row, answer_column, f"{name}, {place}")
        if answer is None and "answer" in columns:
            raise ValueError(f"{name}, {place}: has no answer. Fill it in, remove the row, or set answer_column.")
        others = {c: _text(row, c, f"{name}, {place}") for c in columns if c not in ("prompt", "answer")}
        kept.append(PromptRow(place, column, prompt, answer, others))
    if repeated:
        logger.info(f"{name}: dropped {repeated} rows whose prompt had come before; {len(kept)} are left.")
    if not kept:
        raise ValueError(f"{name} has no rows. Give a file with a prompt in each.")
    _say_contradictions(name, kept)
    return kept


def _say_contradictions(name: str, rows: Sequence[PromptRow]) -> None:
    """Of rows with one prompt and two answers at least one is graded wrongly, whatever the student writes."""
    first: dict[str, PromptRow] = {}
    against: list[tuple[PromptRow, PromptRow]] = []
    for row in rows:
        other = first.setdefault(json.dumps(row.prompt, sort_keys=True), row)
        if row.answer != other.answer and None not in (row.answer, other.answer):
            against.append((other, row))
    if against:
        one, other = against[0]
        logger.warning(
            f"{name}: {len(against)} rows repeat a prompt with another answer, first {one.place} ({one.answer!r}) and "
            f"{other.place} ({other.answer!r}). Remove the wrong ones; the grades of these prompts mean nothing."
        )


def load_prompts(name: str, *, as_chat: bool = False, **where: Any) -> Dataset:
    """Prompts as a dataset with ``prompt`` (text or chat messages) and, where every row has one, ``answer`` (text).

    Of a message role and content are kept, of the assistant's its ``tool_calls`` too, of a tool's its ``name``.

    Args:
        name: Hub id, or a ``.parquet``, ``.json`` or ``.jsonl`` file.
        as_chat: make text prompts one user message each.
        where: ``config`` and ``split`` of a Hub dataset; ``prompt_column`` and ``answer_column``, found by themselves in
            the common layouts: ``prompt`` (with ``reward_model.ground_truth``), ``problem``/``answer``,
            ``question``/``answer`` (of a worked solution what follows ``####``); ``columns``, others to keep as text;
            ``drop_duplicates`` keeps the first row of each prompt, and says how many went.

    Raises:
        ValueError: no rows, no prompt column, or a bad row, which is named with its number (counting from 1).
    """
    rows = read_prompts(name, **where)
    if as_chat:
        rows = [replace(row, prompt=as_messages(row.prompt)) for row in rows]
    odd = odd_kind(rows)
    if odd:
        raise ValueError(f"{name}, {odd.place}: text and chat prompts are mixed. Use one kind, or set as_chat: true.")
    columns = {"prompt": [row.prompt for row in rows]}
    if all(row.answer is not None for row in rows):
        columns["answer"] = [row.answer for row in rows]
    for column in where.get("columns", ()):
        if column not in ("prompt", "answer"):
            columns[column] = [row.others[column] for row in rows]
    plain = {"role", "content"}
    if all(isinstance(row.prompt, str) or all(m.keys() == plain for m in row.prompt) for row in rows):
        return Dataset.from_dict(columns)
    # A table gives every row the keys of all, and templates ask whether a key is there.
    return Dataset.from_dict(
        columns, features=Features({name: Json() if name == "prompt" else Value("string") for name in columns})
    )


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Text as one user message; chat messages as they are."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def odd_kind(rows: list[PromptRow]) -> PromptRow | None:
    """The first row that is chat where the first is text, or the other way round."""
    return next((row for row in rows if isinstance(row.prompt, str) != isinstance(rows[0].prompt, str)), None)
