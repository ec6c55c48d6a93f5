"""The student's side of a micro-batch: one backbone forward, and a loss term from each teacher's answer to it.

The terms are built inside the forward, layer by layer; no trainer, no config object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oprd.models import Head, head_of
from oprd.objectives import attention_map_loss, head_grams, logit_mse
from oprd.states import AttentionObserver, Rollout, TeacherStates, visit_states
from oprd.training.at_layers import AtLayers, Lesson, Sums, compared_layers, exact
from oprd.training.objective import Objective
from oprd.training.output_term import output_term

Terms = dict[str, Tensor]  # unweighted loss terms; they add up over micro-batches and processes


def student_loss(
    objective: Objective, student: nn.Module, teacher: nn.Module, rollout: Rollout, targets: TeacherStates
) -> tuple[Tensor, Terms, Sums]:
    """`joint_loss` of one teacher."""
    return joint_loss(student, [Lesson(objective, teacher, rollout, targets)])


def joint_loss(student: nn.Module, lessons: Sequence[Lesson]) -> tuple[Tensor, Terms, Sums]:
    """One backbone forward of the student; the loss terms are built inside it, layer by layer.

    Args:
        lessons: one per teacher; their rollouts share what the student reads.

    Returns:
        The sum of the weighted objectives, already divided by the denominators that the rollouts' weights hold; its terms;
        and the sums behind the logged averages. Named lessons have theirs under ``NAME/`` too.
    """
    rollout = lessons[0].rollout
    logs: list[tuple[Terms, Sums]] = [({}, {}) for _ in lessons]
    at_layers = [AtLayers(lesson, sums) for lesson, (_, sums) in zip(lessons, logs, strict=True)]

    def visit(layer: int, states_BSd: Tensor) -> list[Tensor | None]:
        return [terms.at(layer, states_BSd) for terms in at_layers]

    def attend(layer: int, *seen: Any) -> list[Tensor | None]:
        return [_attention_term(lesson, layer, *seen) for lesson in lessons]

    watched = sorted({layer for lesson in lessons for layer in lesson.targets.maps})
    observer = AttentionObserver(watched, attend) if watched else None
    last_BSd, per_layer = visit_states(
        student,
        rollout.student,
        sorted({layer for lesson in lessons for layer in compared_layers(lesson.objective)}),
        visit,
        prefix=rollout.student_prefix,
        top_layer=max(lesson.objective.top_layer for lesson in lessons),
        attend=observer,
    )
    total = last_BSd.new_zeros((), dtype=torch.float32)
    for number, (lesson, log) in enumerate(zip(lessons, logs, strict=True)):
        found = [terms[number] for terms in per_layer.values() if terms[number] is not None]
        if found:
            total = total + _representation(lesson, found, log)
        if lesson.targets.maps:
            terms = [maps[number] for maps in observer.results.values() if maps[number] is not None]
            log[0]["attention"] = (term := torch.stack(terms).mean()).detach()
            total = total + lesson.objective.attention_weight * term
        if lesson.objective.uses_head:
            total = total + _head_terms(lesson, student, last_BSd, log)
    return total, *_merged(lessons, logs)


def _representation(lesson: Lesson, per_layer: list[Tensor], log: tuple[Terms, Sums]) -> Tensor:
    """``representation_weight * 1/L sum_l w_l loss_l``."""
    terms, sums = log
    losses_L = torch.stack(per_layer)
    if lesson.weighting is not None and lesson.weighting.layer_weights is not None:
        losses_L = losses_L * lesson.weighting.layer_weights
    term = losses_L.mean()
    terms["representation"] = term.detach()
    for what in ("cosine", "transition_cosine"):
        found = [value for name, value in sums.items() if name.startswith(f"{what}/layer_")]
        if found:
            sums[what] = (torch.stack([total for total, _ in found]).mean(), found[0][1])
    return lesson.objective.representation_weight * term


def _attention_term(
    lesson: Lesson, layer: int, query_PHh: Tensor, key_PGh: Tensor, scaling: float, window: int | None
) -> Tensor | None:
    if layer not in lesson.targets.maps:
        return None
    reading, pairs = lesson.rollout.student, lesson.rollout.state_pairs
    place_N = pairs.student_places(reading.ids_BS.shape[1])
    return attention_map_loss(
        query_PHh,
        key_PGh,
        lesson.targets.maps[layer],
        place_N,
        reading.position_of(place_N),
        lesson.rollout.state_weights_N,
        scaling=scaling,
        window=window,
    )


def _head_terms(lesson: Lesson, student: nn.Module, last_BSd: Tensor, log: tuple[Terms, Sums]) -> Tensor:
    """What is compared through the LM heads: all logits at once, or next-token distributions."""
    objective, rollout, targets = lesson.objective, lesson.rollout, lesson.targets
    terms, sums = log
    total = last_BSd.new_zeros((), dtype=torch.float32)
    own = head_of(student, objective.vocab_size)
    other = head_of(lesson.teacher, objective.teacher_vocab_size or objective.vocab_size)
    if objective.logit_weight:
        with exact(last_BSd.device):
            term = _logit_term(own, other, rollout, last_BSd, targets.at_states)
        total = total + objective.logit_weight * term
        terms["logit"] = term.detach()
    if objective.uses_output:
        term, output_sums = output_term(objective, own, other, rollout, last_BSd, targets)
        total = total + objective.output_weight * term
        terms["output"] = term.detach()
        sums.update({name: value for name, value in output_sums.items() if name not in sums})
    return total


def _logit_term(own: Head, other: Head, rollout: Rollout, last_BSd: Tensor, target_Nd: Tensor) -> Tensor:
    grams = head_grams(own.linear_form(), other.linear_form())
    states = own.linear_states(rollout.state_pairs.of_student(last_BSd))
    return (rollout.state_weights_N * logit_mse(states, other.linear_states(target_Nd), grams)).sum()


def _merged(lessons: Sequence[Lesson], logs: list[tuple[Terms, Sums]]) -> tuple[Terms, Sums]:
    """Added up over teachers, and under each one's name."""
    terms: Terms = {}
    sums: Sums = {}
    for lesson, (own_terms, own_sums) in zip(lessons, logs, strict=True):
        for name, value in own_terms.items():
            terms[name] = terms.get(name, 0) + value
        for name, (value, count) in own_sums.items():
            before, counted = sums.get(name, (0, 0))
            sums[name] = (before + value, counted + count)
        if lesson.name is not None:
            terms |= {f"{lesson.name}/{name}": value for name, value in own_terms.items()}
            sums |= {f"{lesson.name}/{name}": value for name, value in own_sums.items()}
    return terms, sums
