"""From what a trainer was given to teachers that can be asked: first what configs can tell, then the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd import models
from oprd.states import (
    TeacherElsewhere,
    check_observed_attention,
    check_packed_attention,
    tile_mlps,
    use_observed_attention,
    use_packed_attention,
)
from oprd.training import heads
from oprd.training.config import OPRDConfig
from oprd.training.engines import is_sharded, lender_of, place_teacher
from oprd.training.own_teacher import Average, OwnTeacher, average_of_copy
from oprd.training.pair import Pair, open_bridge, open_pair
from oprd.training.privileged import PromptTemplate
from oprd.training.source import Source
from oprd.training.teacher import check_settings, load_teacher, open_teacher
from oprd.training.teachers import Named, Routes, Teacher

logger = get_logger(__name__)

LONGEST = 64  # prompts that are rendered to see whether the teacher's fit


@dataclass(frozen=True)
class Opened:
    """A teacher before its weights are loaded: a path, a model, one elsewhere, or None for the student's own module."""

    named: Named
    model: Any
    pair: Pair

    @property
    def is_student(self) -> bool:
        return self.model is None


def open_teachers(
    named: list[Named],
    student: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizers: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None,
    datasets: Mapping[str, Dataset | IterableDataset],
    routes: Routes | None,
    *,
    has_adapter: bool,
    tools: Sequence[Callable],
    compares_states: bool,
) -> list[Opened]:
    """Every teacher with all that can be known before weights are loaded.

    Args:
        teacher_tokenizers: one for all, or by name.
        datasets: by the names that messages call them, the training one first.
        routes: which teacher reads a row; None where all read every row.

    Raises:
        ValueError: whatever pre-flight finds, with the teacher's name where there are several.
    """
    template = named[0].args.teacher_prompt_template
    for name, rows in datasets.items():
        if routes is not None:
            routes.check(rows, name)
        if template is not None:
            PromptTemplate(template).check(rows, name)
    found: list[Opened] = []
    for one in named:
        try:
            bridge = open_bridge(one.args.bridge if one.bridge is None else one.bridge)
            if bridge is not None:
                _check_through_bridge(one.args)
            own = one.args.teacher_model_kind
            if own is None:
                model, source = open_teacher(one.model, one.args)
                given = teacher_tokenizers
                given = given.get(one.name) if isinstance(given, Mapping) else given
            else:
                tokenizer = given = tokenizer or student.tokenizer("student", "processing_class")
                source = student
                model = None if own == "live" or has_adapter else student.model
                _check_own(one, model, teacher_tokenizers)
            pair = open_pair(
                one.args,
                student,
                source,
                tokenizer,
                given,
                bridge,
                next(iter(datasets.values())),
                tools=tools,
                compares_states=compares_states,
            )
        except ValueError as error:
            if one.name is None:
                raise
            raise ValueError(f"teachers: {one.name}: {error}") from error
        tokenizer = pair.tokenizer
        found.append(Opened(one, model, pair))
    return found


def _check_through_bridge(args: OPRDConfig) -> None:
    """Settings that a bridge leaves nothing of."""
    if not args.representation_weight:
        raise ValueError("The bridge would be ignored: representation_weight is 0.")
    if args.layer_map is not None:
        raise ValueError("layer_map would be ignored: a bridge has a layer map of its own. Remove it.")
    if args.representation_loss == "transition" and args.transition_over != "positions":
        raise ValueError(
            "transition_over: positions is what a bridge can have: every layer has a basis of its own there. Set it so."
        )
    if args.layer_weighting == "teacher_rms" and args.representation_loss != "mse":
        raise ValueError(
            "layer_weighting: teacher_rms would be ignored: through a bridge states are normalised. Use uniform or adaptive, or "
            "representation_loss: mse."
        )


def _check_own(one: Named, model: Any, teacher_tokenizers: Any) -> None:
    """Settings of another teacher where the student is its own; ``model`` is what its copy is made of, None if there is none."""
    if one.model is not None or teacher_tokenizers is not None:
        raise ValueError(
            "teacher_model and teacher_processing_class would be ignored: with teacher_model_kind the student teaches itself. Remove "
            "them, or teacher_model_kind."
        )
    if model is None:
        why = "the teacher has no weights of its own"
        one.args.refuse_ignored(True, why, offload_teacher=False, teacher_load_in_8bit=False)
    else:
        args = copy.copy(one.args)
        args.teacher_model_init_kwargs = None
        check_settings(args, is_path=isinstance(model, str))
    if one.args.teacher_model_kind != "base":
        logger.warning(
            f"teacher_model_kind: {one.args.teacher_model_kind} moves with the student, and the two can drift off together while the loss "
            "falls (docs/results.md). Watch a validation benchmark, lower teacher_update_rate, or use base."
        )


def check_room(opened: list[Opened], rows: Dataset | IterableDataset, args: OPRDConfig) -> None:
    """Teachers' prompts leave room for the longest response, at least without their privileged text.

    Raises:
        ValueError: one of the longest prompts does not, with what to change.
    """
    readers = [one.pair.reader for one in opened if one.pair.reader is not None]
    readers = [reader for reader in readers if reader.prompt_template is not None and reader.context is not None]
    if not readers or isinstance(rows, IterableDataset):
        return
    longest = sorted(range(len(rows)), key=lambda number: -len(str(rows[number]["prompt"])))[:LONGEST]
    for reader in readers:
        for row in map(rows.__getitem__, longest):
            length = len(reader.prompt_ids(reader.prompt_template.fill(row, 0)))
            if length + args.max_completion_length > reader.context:
                raise ValueError(
                    f"teacher_prompt_template makes a prompt of {length} tokens, without any privileged text, of "
                    f"{str(row['prompt'])[:60]!r}: with a response of {args.max_completion_length} it does not fit the teacher's context of "
                    f"{reader.context}. Lower max_completion_length or max_prompt_length, or shorten the template."
                )


def ready_teachers(
    trainer: Any, opened: list[Opened], args: OPRDConfig
) -> tuple[list[Teacher], str, dict[str, Average]]:
    """Weights loaded and placed, the student's LM head settled, and what no loss reaches frozen.

    Args:
        trainer: an `oprd.OPRDTrainer` whose ``model`` is there.

    Returns:
        The teachers, what became of the student's LM head, and the averages that move with the student.

    Raises:
        ValueError: a model that cannot be read, or a head that cannot be had.
    """
    student, accelerator = trainer.model, trainer.accelerator
    loaded = [_load(one, student, args, accelerator.num_processes) for one in opened]
    apart = [teacher for teacher in loaded if teacher is not student]
    for teacher in apart:
        teacher.requires_grad_(False).eval()
    heads.check_loaded(student, apart)
    for one, teacher in zip(opened, loaded, strict=True):
        one.pair.check_bridge(student, teacher)
    lm_head, why = heads.settle(
        student, loaded, [one.pair for one in opened], [one.named.weight for one in opened], args
    )
    adopted = lm_head == "teacher" or (args.teacher_model_kind is not None and not models.is_tied(student))
    objectives = [
        one.named.args.objective(
            layers=one.pair.shapes.layers,
            num_layers=one.pair.shapes.num_layers,
            vocab_size=one.pair.shapes.vocab_size,
            head_adopted=adopted,
            bridge=None if one.pair.bridge is None else one.pair.bridge.to(accelerator.device),
            teacher_vocab_size=one.pair.shapes.teacher_vocab_size,
            layer_map=one.pair.shapes.layer_map,
        )
        for one in opened
    ]
    heads.freeze_and_report(student, loaded, objectives, lm_head, why, head_alone=args.trainable == "head")
    _tile_and_pack(student, apart, args, accelerator)
    if args.attention_weight:
        _observe(student, apart, [one.pair for one in opened])
    teachers, averages = [], {}
    for one, teacher, objective in zip(opened, loaded, objectives, strict=True):
        name, weight, pair = one.named.name, one.named.weight, one.pair
        if one.is_student:
            own = OwnTeacher(student, args.teacher_model_kind, args.teacher_update_rate, args.teacher_sync_steps)
            if own.average is not None:
                averages["teacher"] = own.average
            teachers.append(Teacher(name, weight, pair, objective, None, own.at_hand, own.lend))
            continue
        placed, at_hand = place_teacher(teacher, args, accelerator)
        if args.teacher_model_kind == "ema":
            averages["teacher"] = average_of_copy(student, teacher, args.teacher_update_rate, args.teacher_sync_steps)
        teachers.append(Teacher(name, weight, pair, objective, placed, at_hand, partial(_same, lender_of(teacher))))
    return _shares(teachers, routed=trainer.routes is not None), lm_head, averages


def _same(lender: nn.Module) -> nn.Module:
    return lender


def _load(one: Opened, student: nn.Module, args: OPRDConfig, processes: int) -> nn.Module:
    if one.is_student:
        return student
    if isinstance(one.model, str):
        own = one.named.args
        if own.teacher_model_kind is not None:  # a copy of the student, loaded as it was
            own = copy.copy(own)
            own.teacher_model_init_kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k != "dtype"}
        return load_teacher(one.model, own, student.dtype, processes)
    return copy.deepcopy(one.model) if args.teacher_model_kind is not None else one.model


def _tile_and_pack(student: nn.Module, apart: list[nn.Module], args: OPRDConfig, accelerator: Any) -> None:
    read_here = [model for model in apart if not isinstance(model, TeacherElsewhere)]
    for model in read_here:
        tile_mlps(model)
    if not tile_mlps(student, with_gradient=args.tile_mlp) and args.tile_mlp:
        raise ValueError("tile_mlp would be ignored: the student's blocks have no plain MLP. Unset it.")
    for model in [student, *read_here] if args.is_packed else ():
        use_packed_attention(model)
        if not is_sharded(args):
            with accelerator.autocast():
                check_packed_attention(model, suffix=model is student and args.gradient_scope == "suffix")


def _observe(student: nn.Module, apart: list[nn.Module], pairs: list[Pair]) -> None:
    """Attention maps are compared where both sides read the same tokens with as many heads."""
    heads_of = {models.text_config(model).num_attention_heads for model in (student, *apart)}
    differ = any(p.bridge is not None or p.reader is not None or p.shapes.layer_map is not None for p in pairs)
    if differ or len(heads_of) > 1:
        raise ValueError(
            "attention_weight needs a teacher of the student's family that reads the same tokens with as many attention heads "
            f"({', '.join(map(str, sorted(heads_of)))} here). Set attention_weight: 0."
        )
    if any(isinstance(model, TeacherElsewhere) for model in apart):
        raise ValueError(
            "A teacher elsewhere gives no attention maps. Set attention_weight: 0, or load the teacher here."
        )
    for model in (student, *apart):
        use_observed_attention(model)
        check_observed_attention(model)


def _shares(teachers: list[Teacher], *, routed: bool) -> list[Teacher]:
    """Where all read every row, weights that add up to 1, so that the loss is as large as one teacher's."""
    if routed or teachers[0].name is None:
        return teachers
    total = sum(teacher.weight for teacher in teachers)
    return [replace(teacher, weight=teacher.weight / total) for teacher in teachers]
