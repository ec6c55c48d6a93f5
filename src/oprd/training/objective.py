"""The training objective of one micro-batch: ``output * L_OPD + representation * L_OPRD + logit * L_logit`` (Eq. 7).

One backbone forward of each model on one rollout; no trainer, no config object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from oprd.models import Head, head_of
from oprd.objectives import (
    cosine_similarity,
    full_vocab_kl,
    head_grams,
    logit_mse,
    representation_distance,
    sampled_token,
    top_k_kl,
)
from oprd.objectives.chunked import OutputTerms, chunked_output_terms
from oprd.states import Rollout, visit_states

Terms = dict[str, Tensor]  # unweighted loss terms; they add up over micro-batches and processes
Sums = dict[str, tuple[Tensor, Tensor]]  # name -> (sum over positions, positions)


@dataclass(frozen=True)
class Objective:
    """What is minimised. ``layers`` are 1-based student layers; the teacher's are the same (one architecture)."""

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
    chunk_size: int = 1024

    @property
    def uses_output(self) -> bool:
        return self.output_loss != "none" and self.output_weight != 0

    @property
    def uses_head(self) -> bool:
        """Whether some term sends gradient through the LM head's input (and to the head, if that is trained)."""
        return self.uses_output or self.logit_weight != 0

    @property
    def top_layer(self) -> int:
        """The highest block that any term reaches."""
        return self.num_layers if self.uses_head else max(self.layers)

    def per_position_output(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Student logits, teacher logits ``[n, V]`` and tokens ``[n]`` -> cost ``[n]``."""
        return {
            "sampled": sampled_token,
            "top_k": lambda s, t, _: top_k_kl(s, t, self.output_top_k, self.top_k_support, self.top_k_renormalize),
            "full": lambda s, t, _: full_vocab_kl(s, t),
        }[self.output_loss]

    def at_temperature(self, head: Head) -> Callable[[Tensor], Tensor]:
        """``[n, d] -> [n, V]``: float32 logits of the distribution that responses are sampled from."""
        return lambda states_nd: head.logits(states_nd).float() / self.temperature


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's states at the pairs, and nothing else: per layer ``[N, d]``, and the last layer for the head."""

    layers: dict[int, Tensor]
    at_states: Tensor | None
    at_outputs: Tensor | None


@torch.no_grad()
def teacher_states(objective: Objective, teacher: nn.Module, rollout: Rollout) -> TeacherStates:
    """One backbone forward of the teacher; keeps the supervised positions of the chosen layers."""
    layers = objective.layers if objective.representation_weight else ()
    last_BSd, kept = visit_states(teacher, rollout.teacher, layers, lambda _, h: rollout.state_pairs.of_teacher(h))
    return TeacherStates(
        kept,
        rollout.state_pairs.of_teacher(last_BSd) if objective.logit_weight else None,
        rollout.output_pairs.of_teacher(last_BSd) if objective.uses_output else None,
    )


def student_loss(
    objective: Objective, student: nn.Module, teacher: nn.Module, rollout: Rollout, targets: TeacherStates
) -> tuple[Tensor, Terms, Sums]:
    """One backbone forward of the student; the loss terms are built inside it, layer by layer.

    Returns:
        The weighted objective, already divided by the denominators that the rollout's weights hold; its terms; and the
        sums behind the logged averages. ``teacher`` only lends its head.
    """
    device_type = rollout.student.ids_BS.device.type
    exact = partial(torch.autocast, device_type=device_type, enabled=False)  # losses in float32 whatever the forward
    terms: Terms = {}
    sums: Sums = {}
    num_pairs = torch.tensor(float(len(rollout.state_pairs)), device=rollout.student.ids_BS.device)

    def visit(layer: int, states_BSd: Tensor) -> Tensor:
        with exact():
            own_Nd, target_Nd = rollout.state_pairs.of_student(states_BSd), targets.layers[layer]
            sums[f"cosine/layer_{layer:02d}"] = (cosine_similarity(own_Nd, target_Nd).sum(), num_pairs)
            distance_N = representation_distance(own_Nd, target_Nd, objective.representation_loss)
            return (rollout.state_weights_N * distance_N).sum()

    layers = objective.layers if objective.representation_weight else ()
    last_BSd, per_layer = visit_states(student, rollout.student, layers, visit)
    total = last_BSd.new_zeros((), dtype=torch.float32)

    if per_layer:
        term = torch.stack(list(per_layer.values())).mean()
        total = total + objective.representation_weight * term
        terms["representation"] = term.detach()
        cosines = [sums[f"cosine/layer_{layer:02d}"][0] for layer in per_layer]
        sums["cosine"] = (torch.stack(cosines).mean(), num_pairs)
    if objective.uses_head:
        own, other = (head_of(model, objective.vocab_size) for model in (student, teacher))
        if objective.logit_weight:
            with exact():
                grams = head_grams(own.linear_form(), other.linear_form())
                states = own.linear_states(rollout.state_pairs.of_student(last_BSd))
                distance_N = logit_mse(states, other.linear_states(targets.at_states), grams)
                term = (rollout.state_weights_N * distance_N).sum()
            total = total + objective.logit_weight * term
            terms["logit"] = term.detach()
        if objective.uses_output:
            output = chunked_output_terms(
                objective.per_position_output(),
                rollout.output_pairs.of_student(last_BSd),
                targets.at_outputs,
                rollout.output_tokens_N,
                rollout.output_weights_N,
                objective.at_temperature(own),
                objective.at_temperature(other),
                objective.chunk_size,
            )
            if objective.num_layers not in per_layer and own.weight_Vd.shape[1] == other.weight_Vd.shape[1]:
                cosine_N = cosine_similarity(rollout.output_pairs.of_student(last_BSd), targets.at_outputs)
                sums[f"cosine/layer_{objective.num_layers:02d}"] = (
                    cosine_N.sum(),
                    torch.full_like(num_pairs, len(cosine_N)),
                )
            total = total + objective.output_weight * output.loss
            terms["output"] = output.loss.detach()
            sums |= _output_sums(output, torch.full_like(num_pairs, len(rollout.output_pairs)))
    return total, terms, sums


def _output_sums(output: OutputTerms, count: Tensor) -> Sums:
    return {
        "output_divergence": (output.value_sum, count),
        "entropy/student": (output.student_entropy_sum, count),
        "entropy/teacher": (output.teacher_entropy_sum, count),
        "overlap/top16": (output.overlap_sum, count),
    }
