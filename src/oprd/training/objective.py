"""The training objective of one micro-batch: ``output * L_OPD + representation * L_OPRD + logit * L_logit`` (Eq. 7).

One backbone forward of each model on one rollout; no trainer, no config object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from oprd.bridge import Bridge
from oprd.models import Head, head_of
from oprd.objectives import head_grams, logit_mse, state_term
from oprd.states import Question, Rollout, TeacherStates, answer, autocast_dtype, visit_states
from oprd.training.output_term import output_term

Terms = dict[str, Tensor]  # unweighted loss terms; they add up over micro-batches and processes
Sums = dict[str, tuple[Tensor, Tensor]]  # name -> (sum over positions, positions)


@dataclass(frozen=True)
class Objective:
    """What is minimised. ``layers`` are 1-based student layers; the teacher's are the same or, with a ``bridge``, those of
    its layer map, or those of ``layer_map`` (one for each student layer), where the student has fewer layers.
    ``teacher_vocab_size`` is there where the tokenizers differ."""

    layers: tuple[int, ...]
    num_layers: int
    vocab_size: int
    representation_weight: float = 1.0
    representation_loss: str = "mse"
    logit_weight: float = 0.0
    output_loss: str = "none"
    output_weight: float = 1.0
    output_top_k: int = 16
    top_k_support: str = "student"
    top_k_renormalize: bool = True
    temperature: float = 1.0
    teacher_vocab_size: int | None = None
    offload_targets: bool = False
    layer_map: tuple[int, ...] | None = None
    bridge: Bridge | None = field(default=None, repr=False)

    @property
    def uses_output(self) -> bool:
        return self.output_loss != "none" and self.output_weight != 0

    @property
    def uses_states(self) -> bool:
        """Whether hidden states are compared, or logits through them."""
        return self.representation_weight != 0 or self.logit_weight != 0

    @property
    def uses_head(self) -> bool:
        """Whether some term sends gradient through the LM head's input (and to the head, if that is trained)."""
        return self.uses_output or self.logit_weight != 0

    @property
    def top_layer(self) -> int:
        """The highest block that any term reaches."""
        return self.num_layers if self.uses_head else max(self.layers)


def question_of(objective: Objective, rollout: Rollout) -> Question:
    """What an objective asks of the teacher about one micro-batch; in the precision of the autocast that is on."""
    layers = objective.layers if objective.representation_weight else ()
    bridge, pairs, outputs = objective.bridge, rollout.state_pairs, rollout.output_pairs
    layer_map = bridge.layer_map if bridge else objective.layer_map
    prefix = rollout.prefix if objective.uses_output else None
    width = rollout.teacher.ids_BS.shape[1]
    return Question(
        rollout.teacher,
        pairs.teacher_places(width),
        {layer: layer_map[layer - 1] if layer_map else layer for layer in layers},
        bridge,
        last_at_states=bool(objective.logit_weight),
        output_places_N=outputs.teacher_places(width) if objective.uses_output else None,
        chain_places_E=None if prefix is None else prefix.chain_row_E * width + prefix.chain_column_E,
        dtype=autocast_dtype(rollout.teacher.ids_BS.device),
    )


def teacher_states(objective: Objective, teacher: nn.Module, rollout: Rollout) -> TeacherStates:
    """One backbone forward of the teacher; keeps the supervised positions of the chosen layers."""
    return answer(teacher, question_of(objective, rollout), on_cpu=objective.offload_targets)


def student_loss(
    objective: Objective, student: nn.Module, teacher: nn.Module, rollout: Rollout, targets: TeacherStates
) -> tuple[Tensor, Terms, Sums]:
    """One backbone forward of the student; the loss terms are built inside it, layer by layer.

    Returns:
        The weighted objective, already divided by the denominators that the rollout's weights hold; its terms; and the
        sums behind the logged averages. ``teacher`` only lends its head.
    """
    device = rollout.student.ids_BS.device
    exact = partial(torch.autocast, device_type=device.type, enabled=False)  # losses in float32 whatever the forward
    terms: Terms = {}
    sums: Sums = {}
    num_pairs = torch.tensor(float(len(rollout.state_pairs)), device=device)
    bridge = objective.bridge

    pairs = rollout.state_pairs

    def visit(layer: int, states_BSd: Tensor) -> Tensor:
        if layer == objective.num_layers:  # nothing else keeps the last states until backward
            states_Md, place_N = pairs.of_student(states_BSd), torch.arange(len(pairs), device=device)
        else:
            states_Md, place_N = states_BSd.flatten(0, 1), pairs.student_places(states_BSd.shape[1])
        project = partial(bridge.project_student, layer) if bridge else None
        with exact():
            term, cosine = state_term(
                states_Md,
                place_N,
                targets.layers[layer],
                rollout.state_weights_N,
                objective.representation_loss,
                project,
            )
        sums[f"cosine/layer_{layer:02d}"] = (cosine, num_pairs)
        return term

    layers = objective.layers if objective.representation_weight else ()
    last_BSd, per_layer = visit_states(
        student, rollout.student, layers, visit, prefix=rollout.student_prefix, top_layer=objective.top_layer
    )
    total = last_BSd.new_zeros((), dtype=torch.float32)

    if per_layer:
        term = torch.stack(list(per_layer.values())).mean()
        total = total + objective.representation_weight * term
        terms["representation"] = term.detach()
        cosines = [sums[f"cosine/layer_{layer:02d}"][0] for layer in per_layer]
        sums["cosine"] = (torch.stack(cosines).mean(), num_pairs)
    if objective.uses_head:
        own = head_of(student, objective.vocab_size)
        other = head_of(teacher, objective.teacher_vocab_size or objective.vocab_size)
        if objective.logit_weight:
            with exact():
                term = _logit_term(own, other, rollout, last_BSd, targets.at_states)
            total = total + objective.logit_weight * term
            terms["logit"] = term.detach()
        if objective.uses_output:
            term, output_sums = output_term(objective, own, other, rollout, last_BSd, targets)
            total = total + objective.output_weight * term
            terms["output"] = term.detach()
            sums = output_sums | sums
    return total, terms, sums


def _logit_term(own: Head, other: Head, rollout: Rollout, last_BSd: Tensor, target_Nd: Tensor) -> Tensor:
    grams = head_grams(own.linear_form(), other.linear_form())
    states = own.linear_states(rollout.state_pairs.of_student(last_BSd))
    return (rollout.state_weights_N * logit_mse(states, other.linear_states(target_Nd), grams)).sum()
