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
from oprd.objectives import position_weights, select_positions
from oprd.training.config import OPRDConfig
from oprd.training.objective import Objective
from oprd.training.pairing import TeacherReader


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
    prompts: Sequence[Any],
    *,
    args: OPRDConfig,
    objective: Objective,
    vocab_size: int,
    reader: TeacherReader | None,
    accelerator: Accelerator,
) -> Supervised:
    """The weight of every response token, ``state_weights`` and ``output_weights`` ``[B, C]``, with every denominator in it;
    with a ``reader`` also what the teacher reads. Every process must call it.

    Raises:
        ValueError: too few positions where the states of two tokenizers can be compared.
    """
    generated = batch["completion_mask"].bool() & batch["is_counted"].unsqueeze(1)
    if "tool_mask" in batch:
        generated = generated & batch["tool_mask"].bool()
    tensors: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    masks = {
        "state": select_positions(generated, args.positions, args.position_k),
        "output": generated & (batch["completion_ids"] < vocab_size),  # vLLM may sample padded rows
    }
    if reader is not None:
        tensors = reader.read(prompts, batch["completion_ids"], batch["completion_mask"])
        has_partner = tensors["teacher_columns"][..., 0 if args.state_at == "predictive" else 1] >= 0
        paired = accelerator.reduce(
            torch.stack([(generated & has_partner).sum(), generated.sum()]).float(), reduction="sum"
        )
        metrics["paired_share"] = share = (paired[0] / paired[1].clamp(min=1)).item()
        if objective.representation_weight and reader.crossing is not None:
            reader.check_pairs(batch, generated, args.min_paired_share, share)
        masks["state"] = masks["state"] & has_partner
    used = [masks["state"]] * objective.uses_states + [masks["output"]] * objective.uses_output
    counts = [count for mask in masks.values() for count in (mask.any(1).sum(), mask.sum())]
    counts = torch.stack([*counts, generated.sum(), torch.stack(used).any(0).sum()])
    counts = accelerator.reduce(counts.float(), reduction="sum")
    for (name, mask), (rows, positions) in zip(masks.items(), counts[:4].view(2, 2), strict=True):
        tensors[f"{name}_weights"] = position_weights(mask, args.reduction, num_sequences=rows, num_positions=positions)
    response, trained = counts[4:].tolist()
    metrics["response_tokens"] = response
    return Supervised(tensors, metrics, int(response), int(trained))


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
