"""Between loading and the first step: is the pair placed as it must be, and whose LM head does the student end with."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.logging import get_logger
from torch import nn

from oprd import models
from oprd.bridge import Bridge
from oprd.model_files import check_finite
from oprd.states import TeacherElsewhere
from oprd.training.config import OPRDConfig
from oprd.training.engines import is_sharded
from oprd.training.objective import Objective
from oprd.training.pair import Pair
from oprd.training.solved_head import why_head_cannot_be_solved

logger = get_logger(__name__)

OWN = "the teacher is the student itself"


def check_loaded(student: nn.Module, teachers: Sequence[nn.Module]) -> None:
    """Blocks can be found, each model lies on one device, and every weight is a number.

    Raises:
        ValueError: an architecture whose blocks are unclear, a model split over devices, or a weight that is NaN.
    """
    for teacher in teachers:
        if isinstance(teacher, TeacherElsewhere) and teacher.dtype != models.causal_lm(student).dtype:
            logger.warning(
                f"The teacher's weights are {teacher.dtype} where they are served, the student's {models.causal_lm(student).dtype}: "
                "what the coarser one rounds becomes a distance. oprd serve-teacher has --dtype."
            )
    here = [("teacher", teacher) for teacher in teachers if not isinstance(teacher, TeacherElsewhere)]
    for role, model in [("student", student), *here]:
        models.decoder_layers(models.backbone_of(model))
        check_finite(model, role)
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise ValueError(
                f"The {role} is split over several devices. Use accelerate launch (one process per GPU), make one GPU visible "
                "with CUDA_VISIBLE_DEVICES, or load it with device_map=None."
            )


def settle(
    student: nn.Module, teachers: Sequence[nn.Module], pairs: Sequence[Pair], weights: Sequence[float], args: OPRDConfig
) -> tuple[str, str]:
    """Whose LM head the student starts from (`adopt_or_keep`); of several teachers the mean of theirs; its own where it
    teaches itself."""
    with models.whole(*models.head_parameters(student, *teachers), written=True):
        if args.teacher_model_kind is not None:
            _check_freeze(student, args.lm_head)
            return ("keep" if args.lm_head == "auto" else args.lm_head), OWN
        if len(teachers) > 1:
            return _adopt_mean(student, teachers, pairs, weights, args.lm_head)
        return adopt_or_keep(
            student,
            teachers[0],
            args.lm_head,
            pairs[0].shapes.vocab_size,
            pairs[0].foreign,
            through_bridge=pairs[0].bridge is not None and not is_sharded(args),
            other_vocabulary=pairs[0].shapes.teacher_vocab_size is not None,
            trains_output=args.output_loss != "none",
        )


def _check_freeze(student: nn.Module, lm_head: str) -> None:
    if lm_head == "freeze" and models.is_tied(student):
        raise ValueError("lm_head: freeze would freeze the input embeddings too: this student ties them. Use keep.")


def _adopt_mean(
    student: nn.Module, teachers: Sequence[nn.Module], pairs: Sequence[Pair], weights: Sequence[float], lm_head: str
) -> tuple[str, str]:
    _check_freeze(student, lm_head)
    if lm_head in ("keep", "freeze"):
        return lm_head, f"there are {len(teachers)} teachers"
    vocab_size = pairs[0].shapes.vocab_size
    reasons = [
        pair.foreign or models.why_head_cannot_move(student, teacher, vocab_size)
        for teacher, pair in zip(teachers, pairs, strict=True)
    ]
    lenders = [(w, t) for w, t, why in zip(weights, teachers, reasons, strict=True) if why is None]
    if not lenders:
        told = "; ".join(dict.fromkeys(filter(None, reasons)))
        if lm_head == "teacher":
            raise ValueError(f"lm_head: teacher cannot be: {told}. Use lm_head: auto.")
        return "keep", f"none of the teachers' can be adopted: {told}"
    for _, teacher in lenders:
        if isinstance(teacher, TeacherElsewhere):
            teacher.fetch_head()
    models.adopt_mean_head(student, lenders, vocab_size)
    return "teacher", f"the mean of {len(lenders)} teachers' of {len(teachers)}"


def adopt_or_keep(
    student: nn.Module,
    teacher: nn.Module,
    lm_head: str,
    vocab_size: int,
    foreign: str | None = None,
    *,
    through_bridge: bool = False,
    other_vocabulary: bool = False,
    trains_output: bool = False,
) -> tuple[str, str]:
    """Settle ``lm_head`` and, for ``teacher``, copy the teacher's head over the student's.

    Args:
        foreign: why the teacher's head could say nothing about the student's states (another basis, another vocabulary).
        through_bridge, other_vocabulary, trains_output: what ``solved`` depends on. Through a bridge ``auto`` is ``solved``
            where that can be and no output loss trains the head.

    Returns:
        ``teacher``, ``keep``, ``freeze`` or ``solved``, and in words what is known about the two heads.

    Raises:
        ValueError: a head that cannot be adopted, or frozen, although that was asked for.
    """
    _check_freeze(student, lm_head)
    if lm_head in ("solved", "auto") and through_bridge:
        reason = (
            "the teacher has another vocabulary" if other_vocabulary else why_head_cannot_be_solved(student, teacher)
        )
        reason = reason or ("an output loss trains the head" if trains_output and lm_head == "auto" else None)
        if reason is None:
            return "solved", (
                "oprd train solves it at the end; with the trainer alone, call oprd.training.solved_head.solve_head(trainer) "
                "after train()"
            )
        foreign = f"{foreign}; not solved: {reason}"
        if lm_head == "solved":
            raise ValueError(f"lm_head: solved cannot be: {reason}. Use lm_head: auto.")
    elif lm_head == "solved":
        raise ValueError(
            "lm_head: solved is for states that move through a bridge, and there is none. Use lm_head: auto."
        )
    if foreign:
        if lm_head == "teacher":
            raise ValueError(f"lm_head: teacher cannot be: {foreign}. Use lm_head: auto.")
        return ("keep" if lm_head == "auto" else lm_head), foreign
    reason = models.why_head_cannot_move(student, teacher, vocab_size) if lm_head == "auto" else None
    if lm_head == "auto":
        lm_head = "keep" if reason else "teacher"
    if isinstance(teacher, TeacherElsewhere) and lm_head == "teacher":
        teacher.fetch_head()
    if isinstance(teacher, TeacherElsewhere) and not teacher.has_head:
        why = "the teacher's is elsewhere"  # and a line of a log is not worth fetching it
    else:
        drift = models.head_drift(student, teacher, vocab_size)
        why = "they differ in width" if drift is None else f"the teacher's differs by {drift:.1%}"
    why += f"; not adopted: {reason}" if reason else ""
    if lm_head == "teacher":
        models.adopt_head(student, teacher, vocab_size)
    return lm_head, why


def freeze_and_report(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    objectives: Sequence[Objective],
    lm_head: str,
    why: str,
    *,
    head_alone: bool = False,
) -> None:
    """Switch off gradients that no loss reaches (with ``head_alone`` all but the LM head's), and say what became of it.

    Raises:
        ValueError: the head metric with a model that soft-caps its logits; a tied head that should train alone.
    """
    if head_alone:
        if models.is_tied(student):
            raise ValueError("trainable: head would train the input embeddings too: this student ties them.")
        student.requires_grad_(False)
        models.causal_lm(student).get_output_embeddings().requires_grad_(True)
    for teacher, objective in zip(teachers, objectives, strict=True):
        if objective.logit_weight and any(models.head_of(model).softcap for model in (student, teacher)):
            raise ValueError(
                "logit_weight needs linear logits, and these models soft-cap theirs. Set logit_weight: 0, and have the "
                "student's head trained by output_loss: full or replaced by lm_head: teacher."
            )
        if isinstance(teacher, TeacherElsewhere) and (objective.uses_head or lm_head == "solved"):
            teacher.fetch_head()
    uses_head = any(objective.uses_head for objective in objectives)
    frozen = models.freeze_unreachable(student, top_layer=max(o.top_layer for o in objectives), head=uses_head)
    head = models.causal_lm(student).get_output_embeddings()
    if lm_head == "freeze":
        head.requires_grad_(False)
    trained = any(parameter.requires_grad for parameter in head.parameters())
    is_own = why == OWN
    own = "the student's own"
    how = {"teacher": "the teacher's, adopted", "keep": own, "freeze": f"{own}, frozen", "solved": own}[lm_head]
    logits = ", ".join(dict.fromkeys(f"{objective.logit_weight:g}" for objective in objectives))
    logger.info(
        f"LM head: {how} ({why}); {'trained' if trained else 'not trained'}; logit_weight {logits}. "
        f"{frozen:,} parameters that no loss reaches are frozen."
    )
    bridges = [objective.bridge for objective in objectives if objective.bridge is not None]
    compares = any(objective.representation_weight and objective.bridge is None for objective in objectives)
    if lm_head != "teacher" and not trained and compares and not is_own:
        remedy = "Set lm_head: teacher" + ("." if uses_head else ", or logit_weight: 1.")
        logger.warning(
            "The student keeps its own LM head and nothing trains it: where the teacher's differs, matching states may not "
            f"move accuracy. {remedy}"
        )
    if lm_head != "solved":
        for bridge in bridges:
            warn_of_harm(bridge, trains_output=any(objective.uses_output for objective in objectives))
    if lm_head == "teacher" and models.causal_lm(student) is not student:
        logger.warning(
            "The adopted LM head is in the base weights, which an adapter saved alone does not carry. Save with "
            "oprd.training.run.save_final(trainer, directory), as oprd train does."
        )


def warn_of_harm(bridge: Bridge, *, trains_output: bool) -> None:
    """Say so before a run whose bridge reads the teacher worse than the student reads itself."""
    predicted = bridge.report.get("prediction")
    if not predicted:
        logger.warning("The bridge's report holds no prediction of whether it will help; oprd bridge fit makes one.")
        return
    own, mapped = predicted["student_agreement"], predicted["mapped_teacher_agreement"]
    if mapped <= own:
        logger.warning(
            f"This bridge will probably do harm: mapped into the student's space, the teacher's states agree with the teacher's "
            f"own choice of token at {mapped:.1%} of positions, the student already at {own:.1%}. What the map loses is more "
            "than the student lacks. "
            + (
                "Lower representation_weight"
                if trains_output
                else "Solve the head (lm_head: solved) or distil with output_loss"
            )
            + " (docs/results.md)."
        )
