"""Which response tokens of a step are supervised, and how much each weighs: counted over all processes, after generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oprd.evaluation import grade
from oprd.objectives import position_weights, select_positions, with_previous
from oprd.training.config import OPRDConfig
from oprd.training.teachers import Teacher


def counted_rows(accelerator: Accelerator, rows: int) -> Tensor:
    """Which rows of this process's batch count, ``[B]``: not those that accelerate repeats to fill the last batch of all."""
    state = accelerator.gradient_state
    first = accelerator.process_index * rows
    place_B = torch.arange(first, first + rows, device=accelerator.device)
    has_repeats = accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
    return place_B < (state.remainder if has_repeats else first + rows)


@dataclass(frozen=True)
class Supervised:
    """What of a batch counts: tensors to go with it, what is logged, and tokens over all processes."""

    tensors: dict[str, Tensor]
    metrics: dict[str, float]
    generated: int
    trained: int


def supervise(
    batch: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    args: OPRDConfig,
    teachers: Sequence[Teacher],
    vocab_size: int,
    accelerator: Accelerator,
) -> Supervised:
    """The weight of every response token, ``state_weights`` and ``output_weights`` ``[B, C]``, with every denominator in it;
    with a reader also what the teacher reads. Of several teachers each has its own, as `of_teacher` finds them. Every process
    must call it.

    Where ``batch`` says which teacher reads a row (``route``), the denominators are those of all rows; else each teacher's own.

    Raises:
        ValueError: too few positions where the states of two tokenizers can be compared.
    """
    generated = batch["completion_mask"].bool() & batch["is_counted"].unsqueeze(1)
    if "tool_mask" in batch:
        generated = generated & batch["tool_mask"].bool()
    tensors: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    every: list[dict[str, Tensor]] = []
    used: list[Tensor] = []
    for place, teacher in enumerate(teachers):
        own = generated if "route" not in batch else generated & (batch["route"] == place).unsqueeze(1)
        read, masks, told = _for_one(teacher, batch, rows, own, args, vocab_size, accelerator)
        tensors |= {_key(teacher.name, name): tensor for name, tensor in read.items()}
        metrics |= {name if teacher.name is None else f"{teacher.name}/{name}": value for name, value in told.items()}
        every.append(masks)
        used += [masks["state"]] * teacher.objective.uses_states + [masks["output"]] * teacher.objective.uses_output
        if teacher.objective.needs_transition_weights:
            masks["transition"] = with_previous(masks["state"])
    counts = [count for masks in every for mask in masks.values() for count in (mask.any(1).sum(), mask.sum())]
    counts = torch.stack([*counts, generated.sum(), torch.stack(used).any(0).sum()])
    counts = accelerator.reduce(counts.float(), reduction="sum")
    totals = counts[:-2].view(len(teachers), len(every[0]), 2)
    if "route" in batch:
        totals = totals.sum(0, keepdim=True).expand_as(totals)
    for teacher, masks, of_kinds in zip(teachers, every, totals, strict=True):
        for (kind, mask), (sequences, positions) in zip(masks.items(), of_kinds, strict=True):
            weights = position_weights(mask, args.reduction, num_sequences=sequences, num_positions=positions)
            tensors[_key(teacher.name, f"{kind}_weights")] = teacher.weight * weights
    response, trained = counts[-2:].tolist()
    metrics["response_tokens"] = response
    return Supervised(tensors, metrics, int(response), int(trained))


def _for_one(
    teacher: Teacher,
    batch: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    generated: Tensor,
    args: OPRDConfig,
    vocab_size: int,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """What one teacher reads, the positions of each kind that it supervises, and what is logged of that."""
    masks = {
        "state": select_positions(
            generated, "all" if args.positions == "adaptive" else args.positions, args.position_k
        ),
        "output": generated & (batch["completion_ids"] < vocab_size),  # vLLM may sample padded rows
    }
    reader = teacher.pair.reader
    if reader is None:
        return {}, masks, {}
    read = reader.read(rows, batch["completion_ids"], batch["completion_mask"])
    has_partner = read["teacher_columns"][..., 0 if args.state_at == "predictive" else 1] >= 0
    shortened = (read["teacher_left_out"] > 0) & generated.any(1)
    counts = torch.stack([(generated & has_partner).sum(), generated.sum(), shortened.sum()])
    paired, positions, shortened = accelerator.reduce(counts.float(), reduction="sum").tolist()
    told = {"paired_share": paired / positions} if positions else {}
    if reader.prompt_template is not None:
        told["privileged/shortened"] = shortened
    if positions and teacher.objective.representation_weight and reader.crossing is not None:
        reader.check_pairs(batch, generated, args.min_paired_share, told["paired_share"])
    masks["state"] = masks["state"] & has_partner
    return read, masks, told


def _key(teacher: str | None, name: str) -> str:
    return name if teacher is None else f"{teacher}/{name}"


def of_teacher(batch: Mapping[str, Any], teacher: Teacher) -> Mapping[str, Any]:
    """A batch, or a part of one, as it is for one of several teachers."""
    prefix = _key(teacher.name, "")
    own = {name.removeprefix(prefix): value for name, value in batch.items() if prefix and name.startswith(prefix)}
    return {**batch, **own} if own else batch


def accuracy(
    batch: Mapping[str, Any], answers: Sequence[Any], tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> float:
    """Share of responses with the right answer, over all processes; rows whose answer is None do not count.

    What a tool said is no answer.
    """
    ids = batch["completion_ids"]
    if "tool_mask" in batch:
        ids = [row[said] for row, said in zip(ids, batch["tool_mask"].bool(), strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    rows = zip(texts, answers, batch["is_counted"].tolist(), strict=True)
    right = [float(grade(t, str(a))) if counts and a is not None else float("nan") for t, a, counts in rows]
    return accelerator.gather(torch.tensor(right, device=accelerator.device)).nanmean().item()
