"""Rollouts to processes and micro-batches by length, so that nobody waits and no padding is computed."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from oprd.states import deal, fill

Batch = dict[str, Any]


class MicroBatch(Batch):
    """Rows that go through the models together; there is nothing left to prepare."""


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def lengths_of(batch: Batch) -> Tensor:
    """Tokens of each row, prompt and response, ``[B]``."""
    return batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)


def balance(batch: Batch, inputs: list[dict], accelerator: Accelerator) -> tuple[Batch, list[dict]]:
    """Deal the rows of all processes out again: as many to each as before, with about equal tokens.

    Args:
        batch: padded rollouts of this process; ids and masks only.
        inputs: the dataset rows that they answer.
    """
    if accelerator.num_processes == 1:
        return batch, inputs
    whole = {
        name: accelerator.gather(accelerator.pad_across_processes(value, dim=1)) if _is_rows(value) else value
        for name, value in batch.items()
    }
    everyone = gather_object(inputs)
    mine = deal(lengths_of(whole).tolist(), accelerator.num_processes)[accelerator.process_index]
    place = torch.tensor(mine, device=accelerator.device)
    dealt = {name: value[place] if _is_rows(value) else value for name, value in whole.items()}
    return dealt, [everyone[row] for row in mine]


def cut(batch: Batch, budget: int | None, accelerator: Accelerator, teachers: int = 1) -> list[MicroBatch]:
    """Micro-batches of at most ``budget`` tokens (all in one if it is None); equally many on every process.

    Where rows have a teacher each (``route``, one of ``teachers``), those of a micro-batch have the same, ``teacher``, and
    teachers come one after the other. A process without enough rows ends with a row of no weight, so that all run the same
    number of forwards.
    """
    if "route" not in batch:
        return _cut(batch, None, budget, accelerator)
    routes = [(batch["route"] == teacher).nonzero().flatten().tolist() for teacher in range(teachers)]
    parts = [_cut(batch, rows, budget, accelerator) for rows in routes]
    for teacher, own in enumerate(parts):
        for part in own:
            part["teacher"] = teacher
    return [part for own in parts for part in own]


def _cut(batch: Batch, rows: list[int] | None, budget: int | None, accelerator: Accelerator) -> list[MicroBatch]:
    """Of some of the rows, by default all."""
    if rows is None and budget is None:
        return [MicroBatch(batch)]
    lengths = lengths_of(batch).tolist()
    rows = list(range(len(lengths))) if rows is None else rows
    lengths = [lengths[row] for row in rows]

    def groups(at_least: int) -> list[list[int]]:
        if budget is None:
            return [list(range(len(rows)))] if rows or at_least else []
        return fill(lengths, budget, at_least=at_least)

    found = groups(0)
    if accelerator.num_processes > 1:
        count = torch.tensor([len(found)], device=accelerator.device)
        found = groups(int(accelerator.gather(count).max()))
    return [rows_of(batch, [rows[number] for number in group]) for group in found]


def rows_of(batch: Batch, group: list[int]) -> MicroBatch:
    """Some rows of a batch; a row of no weight if there are none."""
    place = torch.tensor(group or [0], device=batch["prompt_mask"].device)
    part = MicroBatch({name: value[place] if _is_rows(value) else value for name, value in batch.items()})
    if not group:
        part |= {name: torch.zeros_like(value) for name, value in part.items() if name.endswith("_weights")}
    return part


def halved(part: MicroBatch, limit: int | None) -> list[MicroBatch]:
    """The rows of a micro-batch in halves, and halves of those, until each has at most ``limit`` tokens or one row."""
    tokens, rows = lengths_of(part), len(part["prompt_mask"])
    if limit is None or rows == 1 or int(tokens.sum()) <= limit:
        return [part]
    pieces = [rows_of(part, list(group)) for group in (range(rows // 2), range(rows // 2, rows))]
    return [small for piece in pieces for small in halved(piece, limit)]
