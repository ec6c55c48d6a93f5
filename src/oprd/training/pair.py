"""Student and teacher before their weights are loaded: tokenizers, shapes, and how the one is read by the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from oprd import models
from oprd.bridge import Bridge, model_fingerprint, tokenizer_fingerprint
from oprd.objectives import select_layers
from oprd.states import Crossing
from oprd.training import preflight
from oprd.training.config import OPRDConfig
from oprd.training.pairing import TeacherReader
from oprd.training.privileged import PromptTemplate
from oprd.training.quantised import check_origin
from oprd.training.source import Source
from oprd.training.tools import check_one_rendering, check_tools, rendering

logger = get_logger(__name__)


@dataclass(frozen=True)
class Pair:
    """What is settled before weights are loaded.

    ``reader`` is None where the teacher reads the student's own tokens. ``foreign`` says why the teacher's LM head means
    nothing to the student, if it does not.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    shapes: preflight.Shapes
    reader: TeacherReader | None
    bridge: Bridge | None
    foreign: str | None

    def check_bridge(self, student: Any, teacher: Any) -> None:
        """The loaded models are those that the bridge was fitted for.

        Raises:
            ValueError: with both fingerprints.
        """
        if self.bridge is not None and self.bridge.fitted_for:
            self.bridge.check_fitted_for(self.fingerprints(student, teacher))

    def fingerprints(self, student: Any, teacher: Any) -> dict[str, str]:
        """Of both models and both tokenizers, by role."""
        return {
            "student": model_fingerprint(student),
            "teacher": model_fingerprint(teacher),
            "student_tokenizer": tokenizer_fingerprint(self.tokenizer),
            "teacher_tokenizer": tokenizer_fingerprint(self.teacher_tokenizer or self.tokenizer),
        }


def open_bridge(bridge: Bridge | str | None) -> Bridge | None:
    """A bridge as given or from its folder.

    Raises:
        ValueError: ``auto``, which oprd train settles before there is a trainer; anything `Bridge.from_pretrained` finds.
    """
    if bridge == "auto":
        raise ValueError("bridge: auto is for oprd train. Fit one with oprd bridge fit and pass its folder.")
    return Bridge.from_pretrained(models.resolve_path(bridge)) if isinstance(bridge, str) else bridge


def open_pair(
    args: OPRDConfig,
    student: Source,
    teacher: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    bridge: Bridge | None,
    train_dataset: Dataset | IterableDataset,
    *,
    tools: Sequence[Callable] = (),
    compares_states: bool | None = None,
) -> Pair:
    """Whatever configs, tokenizers and generation configs can tell.

    Raises:
        ValueError: anything that pre-flight finds (`oprd.training.preflight`).
    """
    student.check("student", (args.model_init_kwargs or {}).get("attn_implementation"))
    check_origin(student)
    teacher.check("teacher", (args.teacher_model_init_kwargs or {}).get("attn_implementation"))
    tokenizer = tokenizer or student.tokenizer("student", "processing_class")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class must be a tokenizer, got {type(tokenizer).__name__}: text models only.")
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(
                f"eos_token {args.eos_token!r} is not a token of the student's tokenizer. Choose one of its tokens, or unset it."
            )
        tokenizer.eos_token = args.eos_token
    teacher_tokenizer = teacher_tokenizer or teacher.tokenizer_if_known()
    if teacher_tokenizer is None:
        logger.warning("The teacher's tokenizer is not known: pass teacher_processing_class to have it compared.")
    prompt = next(iter(train_dataset))["prompt"]
    reading = (
        preflight.SAME
        if teacher_tokenizer is None
        else preflight.compare_tokenizers(tokenizer, teacher_tokenizer, prompt)
    )
    crosses = reading == preflight.OTHER_TOKENS
    check_tools(tools, args, tokenizer, prompt)
    if tools and teacher_tokenizer is not None and not crosses:
        check_one_rendering(tokenizer, teacher_tokenizer, tools, prompt)
        reading = preflight.SAME  # with tools in it, the prompt reads alike
    shapes = preflight.check_models(
        student.config,
        teacher.config,
        tokenizer,
        layers=args.layers,
        compares_states=args.representation_weight > 0 if compares_states is None else compares_states,
        other_tokenizer=teacher_tokenizer if crosses else None,
        bridge=bridge,
        layer_map=args.layer_map,
        teaches_itself=args.teacher_model_kind is not None,
    )
    if args.attention_weight:
        select_layers(args.attention_layers, shapes.num_layers)
    if args.representation_loss == "transition" and args.transition_over != "positions" and len(shapes.layers) < 2:
        raise ValueError(
            f"transition_over: {args.transition_over} needs two compared layers, and layers: {args.layers} is one. Choose more "
            "layers, or transition_over: positions."
        )
    if shapes.layer_map is not None:
        pairs = ", ".join(f"{layer} with {shapes.layer_map[layer - 1]}" for layer in shapes.layers)
        logger.info(f"Layers are compared through a map, the student's with the teacher's: {pairs}.")
    student_ends = models.end_token_ids(tokenizer, student.generation_config)
    if tokenizer.eos_token_id is None and student_ends:  # only the generation config knows
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(student_ends))
    teacher_ends = models.end_token_ids(teacher_tokenizer or tokenizer, teacher.generation_config)
    known = teacher_tokenizer is not None
    teacher_end = models.end_of_turn(teacher_tokenizer, chat=isinstance(prompt, list)) if known else None
    if crosses:
        preflight.check_crossing(args, shapes.vocab_size, teacher_tokenizer, prompt, bool(tools))
        preflight.check_end_tokens(tokenizer, student_ends, set())
    else:
        preflight.check_end_tokens(tokenizer, student_ends, teacher_ends, teacher_end)
    reader, prompt_template = None, None
    if args.teacher_prompt_template is not None:
        prompt_template = PromptTemplate(args.teacher_prompt_template)
    if reading != preflight.SAME or prompt_template is not None:
        crossing = None
        if crosses:
            ends = {"student_ends": student_ends, "teacher_end": teacher_end, "teacher_ends": teacher_ends}
            crossing = Crossing(tokenizer, teacher_tokenizer, **ends)
        template = {**(args.chat_template_kwargs or {}), **rendering(tools, teacher_tokenizer or tokenizer)}
        reader = TeacherReader(
            teacher_tokenizer or tokenizer,
            crossing,
            shapes.teacher_context,
            template,
            prompt_template,
            args.max_teacher_prompt_length,
        )
        logger.info(
            "The teacher reads prompts in its own "
            + ("template, with " + ", ".join(prompt_template.columns) if prompt_template else "chat template")
            + (" and responses in its own tokens, aligned on bytes." if crosses else ".")
        )
    foreign = (
        "it has another vocabulary"
        if crosses
        else "through a bridge the teacher's states stay in their own basis, and so does its head"
        if bridge is not None
        else None
    )
    return Pair(tokenizer, teacher_tokenizer, shapes, reader, bridge, foreign)


def fit_prompts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: OPRDConfig,
    context: int | None,
    tools: Sequence[Callable] = (),
) -> Dataset | IterableDataset:
    """Prompts that leave room for a response, and enough of them for a step."""
    if isinstance(dataset, IterableDataset):
        if args.max_prompt_length is not None:
            raise ValueError("max_prompt_length needs a dataset that is loaded whole, not a streaming one.")
        return dataset
    dataset = preflight.fit_prompts(
        dataset,
        preflight.prompt_lengths(
            dataset, tokenizer, **(args.chat_template_kwargs or {}), **rendering(tools, tokenizer)
        ),
        context=context,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        max_tokens_per_microbatch=args.max_tokens_per_microbatch,
    )
    preflight.check_step_size(len(dataset), args.responses_per_step, args.responses_per_prompt)
    return dataset
