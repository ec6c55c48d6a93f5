"""The student's side of a micro-batch: one backbone forward, and a loss term from each teacher's answer to it.

The terms are built inside the forward, layer by layer; no trainer, no config object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from oprd.models import Head, head_of
from oprd.objectives import head_grams, logit_mse, state_term
from oprd.states import Rollout, TeacherStates, visit_states
from oprd.training.objective import Objective
from oprd.training.output_term import output_term

Terms = dict[str, Tensor]  # unweighted loss terms; they add up over micro-batches and processes
Sums = dict[str, tuple[Tensor, Tensor]]  # name -> (sum over positions, positions)


@dataclass(frozen=True)
class Lesson:
    """What one teacher has to say about a micro-batch. ``teacher`` only lends its head; ``name`` is for the log where there
    are several teachers."""

    objective: Objective
    teacher: nn.Module
    rollout: Rollout
    targets: TeacherStates
    name: str | None = None


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

    def visit(layer: int, states_BSd: Tensor) -> list[Tensor | None]:
        return [
            _state_term(lesson, layer, states_BSd, sums) if layer in _layers(lesson) else None
            for lesson, (_, sums) in zip(lessons, logs, strict=True)
        ]

    last_BSd, per_layer = visit_states(
        student,
        rollout.student,
        sorted({layer for lesson in lessons for layer in _layers(lesson)}),
        visit,
        prefix=rollout.student_prefix,
        top_layer=max(lesson.objective.top_layer for lesson in lessons),
    )
    total = last_BSd.new_zeros((), dtype=torch.float32)
    for number, (lesson, log) in enumerate(zip(lessons, logs, strict=True)):
        found = [terms[number] for terms in per_layer.values() if terms[number] is not None]
        total = total + _lesson_loss(lesson, student, found, last_BSd, log)
    return total, *_merged(lessons, logs)


def _layers(lesson: Lesson) -> tuple[int, ...]:
    return lesson.objective.layers if lesson.objective.representation_weight else ()


def _exact(device: torch.device):
    """Losses are in float32 whatever the forward."""
    return torch.autocast(device_type=device.type, enabled=False)


def _state_term(lesson: Lesson, layer: int, states_BSd: Tensor, sums: Sums) -> Tensor:
    objective, pairs, bridge = lesson.objective, lesson.rollout.state_pairs, lesson.objective.bridge
    device = states_BSd.device
    if layer == objective.num_layers:  # nothing else keeps the last states until backward
        states_Md, place_N = pairs.of_student(states_BSd), torch.arange(len(pairs), device=device)
    else:
        states_Md, place_N = states_BSd.flatten(0, 1), pairs.student_places(states_BSd.shape[1])
    project = partial(bridge.project_student, layer) if bridge else None
    with _exact(device):
        term, cosine = state_term(
            states_Md,
            place_N,
            lesson.targets.layers[layer],
            lesson.rollout.state_weights_N,
            objective.representation_loss,
            project,
        )
    sums[f"cosine/layer_{layer:02d}"] = (cosine, _count(len(pairs), device))
    return term


def _count(number: int, device: torch.device) -> Tensor:
    return torch.tensor(float(number), device=device)


def _lesson_loss(
    lesson: Lesson, student: nn.Module, per_layer: list[Tensor], last_BSd: Tensor, log: tuple[Terms, Sums]
) -> Tensor:
    """The weighted objective of one teacher, given its terms at the layers."""
    objective, rollout, targets = lesson.objective, lesson.rollout, lesson.targets
    terms, sums = log
    total = last_BSd.new_zeros((), dtype=torch.float32)
    if per_layer:
        term = torch.stack(per_layer).mean()
        total = total + objective.representation_weight * term
        terms["representation"] = term.detach()
        cosines = [sums[f"cosine/layer_{layer:02d}"][0] for layer in _layers(lesson)]
        sums["cosine"] = (torch.stack(cosines).mean(), _count(len(rollout.state_pairs), last_BSd.device))
    if objective.uses_head:
        own = head_of(student, objective.vocab_size)
        other = head_of(lesson.teacher, objective.teacher_vocab_size or objective.vocab_size)
        if objective.logit_weight:
            with _exact(last_BSd.device):
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
