"""Our update step: the objective of a training run on a rollout. One table of variants."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from benchmarks.update_step.peers import Method
from benchmarks.update_step.swapping import Swap, swapped
from benchmarks.update_step.workload import Batch, Models, Shape
from torch import Tensor

from oprd.models import decoder_layers
from oprd.objectives import projection, select_positions, streaming
from oprd.states import Rollout, make_rollout, only, pack, tile_mlps, use_packed_attention
from oprd.states.tiling import TILE
from oprd.training import output_term
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, teacher_states

LAST_K = 2000  # at the full shape


@dataclass(frozen=True)
class Variant:
    """``settings`` of `Objective`, whether only the last k positions count, how the models read, and whether what is only
    logged (cosines, entropies, overlap) is computed."""

    settings: dict[str, Any] = field(default_factory=dict)
    last_k: bool = False
    packed: bool = True
    suffix: bool = False
    tiled: bool = False
    metrics: bool = True


OUTPUT = {"representation_weight": 0.0}
VARIANTS: dict[str, Variant] = {
    "OPRD, padded": Variant(packed=False),
    "OPRD": Variant(),
    "OPRD, no metrics": Variant(metrics=False),
    "OPRD, tiled MLP": Variant(tiled=True),
    "OPRD + head metric": Variant({"logit_weight": 1.0}),
    "OPRD last k, padded": Variant(last_k=True, packed=False),
    "OPRD last k": Variant(last_k=True),
    "OPRD last k, tiled MLP": Variant(last_k=True, tiled=True),
    "OPRD last k, suffix": Variant(last_k=True, suffix=True),
    "OPRD last k + head metric, suffix": Variant({"logit_weight": 1.0}, last_k=True, suffix=True),
    "top-16 renormalised": Variant({**OUTPUT, "output_loss": "top_k"}),
    "top-16 renormalised, no metrics": Variant({**OUTPUT, "output_loss": "top_k"}, metrics=False),
    "top-16": Variant({**OUTPUT, "output_loss": "top_k", "top_k_renormalize": False}),
    "full KL": Variant({**OUTPUT, "output_loss": "full"}),
    "full KL, padded": Variant({**OUTPUT, "output_loss": "full"}, packed=False),
    "OPRD + full KL": Variant({"output_loss": "full"}),
}


def objective(shape: Shape, **settings: Any) -> Objective:
    return Objective(tuple(range(1, shape.layers + 1)), shape.layers, shape.vocab, **settings)


def rollout_of(batch: Batch, variant: Variant, shape: Shape) -> Rollout:
    """Every response token supervised, weighed by one over their number in the whole batch; of states perhaps the last k."""
    mask_BC = batch.completion_mask_BC.bool()
    states_BC = select_positions(mask_BC, "last_k", max(round(LAST_K * shape.scale), 1)) if variant.last_k else mask_BC
    rollout = make_rollout(
        batch.prompt_ids_BP,
        batch.prompt_mask_BP,
        batch.completion_ids_BC,
        batch.completion_mask_BC,
        state_weights_BC=states_BC.float() / batch.total,
        output_weights_BC=mask_BC.float() / batch.total,
    )
    chosen = objective(shape, **variant.settings)
    rollout = only(rollout, states=chosen.uses_states, outputs=chosen.uses_output)
    return pack(rollout, suffix=variant.suffix) if variant.packed else rollout


def loss(chosen: Objective, metrics: bool, models: Models, rollout: Rollout) -> Tensor:
    targets = teacher_states(chosen, models.teacher, rollout)
    with swapped(*([] if metrics else without_metrics())):
        return student_loss(chosen, models.student, models.teacher, rollout, targets)[0]


def without_metrics() -> list[Swap]:
    """Nothing is computed that no loss needs."""

    def zeros(states_nd: Tensor, _: Tensor) -> Tensor:
        return states_nd.new_zeros(len(states_nd), dtype=torch.float32)

    return [
        (streaming, "cosine_similarity", zeros),
        (output_term, "cosine_similarity", zeros),
        (output_term, "measured", lambda *_: {}),
    ]


def set_up(variant: Variant, shape: Shape, models: Models) -> None:
    """What the trainer does to models that it has loaded. States that are given have no blocks to change."""
    if isinstance(decoder_layers(models.student.base_model)[0], torch.nn.Identity):
        return
    tokens = max(round(TILE * shape.scale), 1)
    tile_mlps(models.teacher, tokens)
    tile_mlps(models.student, tokens, with_gradient=variant.tiled)
    if variant.packed:
        for model in (models.student, models.teacher):
            use_packed_attention(model)


def ours(shape: Shape) -> dict[str, Method]:
    """Every row that is ours."""
    return {
        f"ours: {name}": Method(
            partial(loss, chosen := objective(shape, **variant.settings), variant.metrics),
            partial(rollout_of, variant=variant, shape=shape),
            set_up=partial(set_up, variant, shape),
            head_trains=chosen.uses_head,
            packed=variant.packed,
        )
        for name, variant in VARIANTS.items()
    }


def our_chunks(shape: Shape) -> list[Swap]:
    """As TRL's tiles: what a chunk may take on a GPU, shrunk with lengths and vocabulary."""
    return [
        (projection, "CPU_COPY_BYTES", max(round(projection.COPY_BYTES * shape.scale**2), 1)),
        (streaming, "SLICE_BYTES", max(round(streaming.SLICE_BYTES * shape.scale**2), 1)),
    ]
