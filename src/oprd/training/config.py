"""`OPRDConfig`: TRL's distillation settings plus what is compared, where and how."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers.utils import is_torch_bf16_gpu_available
from trl import DistillationConfig

from oprd.bridge import Bridge
from oprd.objectives import select_layers
from oprd.serving.client import check_url
from oprd.training.objective import Objective
from oprd.training.options import CHOICES, HELP, MAY_BE_OPEN
from oprd.training.ranges import check_ranges
from oprd.training.surroundings import check_backends
from oprd.training.teacher_settings import check_teachers


def _option(name: str, default: Any) -> Any:
    return field(default=default, metadata={"help": HELP[name].replace("%", "%%")})


@dataclass
class OPRDConfig(DistillationConfig):
    """Settings of `OPRDTrainer`: every key of ``trl.DistillationConfig`` and of ``transformers.TrainingArguments``, plus
    the fields below. The objective is ``output_weight * L_OPD + representation_weight * L_OPRD + logit_weight * L_logit``
    on one rollout. ``oprd train --help`` explains each field.

    Defaults that differ from TRL: learning rate 1e-5, cosine schedule with 3 % warm-up (the paper's), bf16 only where
    the hardware has it.

    Raises:
        ValueError: an unknown choice, an objective with nothing in it, or a setting that would be ignored.
    """

    report_to_is_open: ClassVar[bool] = False  # a recipe without report_to: `oprd.training.dashboard` settles it

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or their share of the run if below 1."})

    representation_weight: float = _option("representation_weight", 1.0)
    representation_loss: str | None = _option("representation_loss", None)
    transition_over: str = _option("transition_over", "positions")
    layer_weighting: str = _option("layer_weighting", "uniform")
    attention_weight: float = _option("attention_weight", 0.0)
    attention_layers: str = _option("attention_layers", "last")
    attention_keys: int = _option("attention_keys", 64)
    bridge: str | None = _option("bridge", None)
    min_paired_share: float = _option("min_paired_share", 0.2)
    layers: str = _option("layers", "all")
    layer_map: str | None = _option("layer_map", None)
    positions: str = _option("positions", "all")
    position_k: int = _option("position_k", 2000)
    state_at: str = _option("state_at", "predictive")
    logit_weight: float | None = _option("logit_weight", None)
    output_loss: str = _option("output_loss", "none")
    output_weight: float = _option("output_weight", 1.0)
    output_top_k: int = _option("output_top_k", 16)
    top_k_support: str = _option("top_k_support", "student")
    top_k_renormalize: bool = _option("top_k_renormalize", True)
    reduction: str = _option("reduction", "sequence")
    lm_head: str = _option("lm_head", "auto")
    trainable: str = _option("trainable", "all")
    eos_token: str | None = _option("eos_token", None)
    responses_per_prompt: int = _option("responses_per_prompt", 1)
    max_prompt_length: int | None = _option("max_prompt_length", None)
    max_tokens_per_microbatch: int | None = _option("max_tokens_per_microbatch", None)
    gradient_scope: str = _option("gradient_scope", "full")
    tile_mlp: bool = _option("tile_mlp", False)
    offload_targets: bool = _option("offload_targets", False)
    on_nonfinite: str = _option("on_nonfinite", "stop")
    offload_teacher: bool = _option("offload_teacher", False)
    teacher_load_in_8bit: bool = _option("teacher_load_in_8bit", False)
    teacher_url: str | None = _option("teacher_url", None)
    teacher_token_file: str | None = _option("teacher_token_file", None)
    teachers: dict | str | None = field(default=None, metadata={"help": HELP["teachers"]})
    teacher_column: str | None = _option("teacher_column", None)
    teacher_model_kind: str | None = _option("teacher_model_kind", None)
    teacher_update_rate: float = _option("teacher_update_rate", 0.005)
    teacher_sync_steps: int = _option("teacher_sync_steps", 1)
    teacher_prompt_template: str | None = _option("teacher_prompt_template", None)
    max_teacher_prompt_length: int | None = _option("max_teacher_prompt_length", None)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_backends(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # what no loss reaches is frozen, so nothing is left to look for
        if self.activation_checkpointing is None:  # TRL has a default for the old name, and transformers warns of it
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        self.layers, self.attention_layers = parse_layers(self.layers), parse_layers(self.attention_layers)
        self.layer_map = None if self.layer_map is None else parse_layer_map(self.layer_map)
        self._check_choices()
        self._check_objective()
        self._check_teacher()
        self._check_batches()

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            is_open = name in MAY_BE_OPEN and getattr(self, name) is None
            if getattr(self, name) not in allowed and not is_open:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("representation_weight", "logit_weight", "output_weight", "attention_weight"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number that is not negative, got {getattr(self, name)}.")
        if not 0 <= self.min_paired_share <= 1:
            raise ValueError(f"min_paired_share must lie in 0..1, got {self.min_paired_share}.")
        for name in (
            "position_k",
            "attention_keys",
            "output_top_k",
            "responses_per_prompt",
            "max_prompt_length",
            "max_tokens_per_microbatch",
            "max_teacher_prompt_length",
            "teacher_sync_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def _check_objective(self) -> None:
        if not (self.representation_weight or self.logit_weight or (self.output_loss != "none" and self.output_weight)):
            raise ValueError(
                "Nothing to minimise: set representation_weight, logit_weight, or output_loss with a positive output_weight."
            )
        if self.beta != 1.0:
            raise ValueError(
                f"beta={self.beta} would be ignored: output losses here are reverse KL. Choose one with output_loss, "
                "or use trl.DistillationTrainer for the generalised JSD."
            )

        self.refuse_ignored(self.output_loss == "none", "output_loss: none", output_weight=1.0)
        if self.output_loss != "none" and not self.output_weight:
            raise ValueError(
                f"output_loss={self.output_loss!r} would be ignored: output_weight is 0. Set output_loss: none."
            )
        ignored = "output_loss is not top_k"
        self.refuse_ignored(
            self.output_loss != "top_k", ignored, output_top_k=16, top_k_support="student", top_k_renormalize=True
        )
        self.refuse_ignored(
            not self.representation_weight,
            "representation_weight is 0",
            bridge=None,
            layer_map=None,
            representation_loss=None,
            layer_weighting="uniform",
            min_paired_share=0.2,
            offload_targets=False,
        )
        self._check_changes_and_maps()
        if self.positions == "adaptive" and not self.representation_weight:
            raise ValueError("positions: adaptive would be ignored (representation_weight is 0). Use positions: all.")
        self.refuse_ignored(self.bridge is not None, "a bridge has a layer map of its own", layer_map=None)
        if self.trainable == "head" and self.output_loss == "none" and not self.logit_weight:
            raise ValueError("trainable: head needs a term that reaches the LM head: set output_loss or logit_weight.")
        if self.trainable == "head" and self.lm_head == "freeze":
            raise ValueError("trainable: head and lm_head: freeze leave nothing to train.")
        self.refuse_ignored(self.trainable == "head", "trainable: head", gradient_scope="full")
        takes_k = self.positions in ("first_k", "last_k", "random_k")
        self.refuse_ignored(not takes_k, f"positions: {self.positions} takes no k", position_k=2000)

    def _check_changes_and_maps(self) -> None:
        is_change = self.representation_loss == "transition"
        self.refuse_ignored(not is_change, "representation_loss is not transition", transition_over="positions")
        if is_change and self.transition_over != "positions":
            if self.bridge is not None:
                raise ValueError(
                    "transition_over: positions is what a bridge can have: every layer has a basis of its own there. Set it so."
                )
            why = "changes between layers all count alike"
            self.refuse_ignored(self.transition_over == "layers", why, layer_weighting="uniform")
            if self.positions == "adaptive":
                raise ValueError(
                    f"positions: adaptive cannot be with transition_over: {self.transition_over}. Use positions: all."
                )
        if self.layer_weighting == "teacher_rms" and (self.representation_loss or "mse") != "mse":
            raise ValueError(
                f"layer_weighting: teacher_rms would be ignored: {self.representation_loss} has no scale. Use uniform or adaptive."
            )
        self.refuse_ignored(
            not self.attention_weight, "attention_weight is 0", attention_layers="last", attention_keys=64
        )
        if self.attention_weight and not self.representation_weight:
            raise ValueError("attention_weight is an extra term beside hidden states: set representation_weight too.")
        if self.attention_weight and self.gradient_scope == "suffix":
            raise ValueError("attention_weight needs gradient_scope: full: a prefix's keys are constants there.")

    def _check_teacher(self) -> None:
        check_teachers(self)
        self.refuse_ignored(self.teacher_url is None, "there is no teacher_url", teacher_token_file=None)
        if self.teacher_url is None:
            return
        self.teacher_url = check_url(self.teacher_url)
        if self.teacher_model_name_or_path is not None:
            raise ValueError(
                "Two teachers: teacher_model_name_or_path is loaded here, teacher_url is asked. Remove one of them."
            )
        self.refuse_ignored(
            True,
            "the teacher is at teacher_url; oprd serve-teacher has --dtype, --attn_implementation and --revision",
            teacher_load_in_8bit=False,
            offload_teacher=False,
            teacher_model_init_kwargs=None,
            teacher_model_revision=None,
        )

    def refuse_ignored(self, is_off: bool, why: str, **defaults: Any) -> None:
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if is_off and changed:
            raise ValueError(f"{', '.join(changed)} would be ignored ({why}). Remove it.")

    @property
    def is_packed(self) -> bool:
        """Whether the models read packed rows."""
        return self.max_tokens_per_microbatch is not None or self.gradient_scope == "suffix"

    @property
    def responses_per_step(self) -> int:
        """Responses sampled for one update, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _check_batches(self) -> None:
        if self.responses_per_step % self.responses_per_prompt:
            raise ValueError(
                f"responses_per_prompt={self.responses_per_prompt} does not divide the {self.responses_per_step} responses of a step "
                "(per_device_train_batch_size x gradient_accumulation_steps x processes)."
            )

    def objective(
        self,
        *,
        layers: list[int],
        num_layers: int,
        vocab_size: int,
        head_adopted: bool,
        bridge: Bridge | None = None,
        teacher_vocab_size: int | None = None,
        layer_map: tuple[int, ...] | None = None,
    ) -> Objective:
        """The objective in plain values, for models of ``num_layers`` and ``vocab_size`` tokens (``teacher_vocab_size``
        where the teacher has others; ``layer_map`` where it has more layers).

        Settles an open ``logit_weight``: a student whose states move towards the teacher's under its own head needs a term
        that moves the head along (docs/results.md), unless it adopted the teacher's or an output loss trains it. Through a
        bridge the states say nothing about the head's own basis, and the weight stays 0.
        """
        output = self.output_loss != "none" and self.output_weight > 0
        needed = self.representation_weight > 0 and not head_adopted and not output and bridge is None
        shared = {f.name for f in fields(Objective)} & {f.name for f in fields(self)}
        shared -= {"layers", "layer_map", "logit_weight", "bridge", "representation_loss", "attention_layers"}
        attended = select_layers(self.attention_layers, num_layers) if self.attention_weight else []
        return Objective(
            layers=tuple(layers),
            attention_layers=tuple(attended),
            num_layers=num_layers,
            vocab_size=vocab_size,
            logit_weight=float(needed) if self.logit_weight is None else self.logit_weight,
            representation_loss=self.representation_loss or ("mse" if bridge is None else "normalized_mse"),
            bridge=bridge,
            teacher_vocab_size=teacher_vocab_size,
            layer_map=layer_map,
            **{name: getattr(self, name) for name in shared},
        )


def parse_layers(value: str | int | list[int]) -> str | list[int]:
    """``all`` and its like as they are; ``4,8,12`` or ``[4, 8, 12]`` as a list of numbers."""
    parsed = value
    if isinstance(value, str) and any(c.isdigit() for c in value):
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = None
    if isinstance(parsed, str):
        return parsed
    numbers = [parsed] if isinstance(parsed, int) else parsed
    if not isinstance(numbers, list | tuple) or any(type(number) is not int for number in numbers):
        raise ValueError(f"layers={value!r} is neither a name nor a list of whole numbers such as 4,8,12.")
    return list(numbers)


def parse_layer_map(value: str | list[int]) -> list[int]:
    """``1,2,4,6`` or ``[1, 2, 4, 6]`` as a list of numbers; whether they fit the models is pre-flight's to say."""
    try:
        numbers = parse_layers(value)
    except ValueError:
        numbers = None
    if not isinstance(numbers, list) or not numbers:
        raise ValueError(
            f"layer_map={value!r} must be the teacher's layer of each student layer, such as 1,2,4,6. Correct or remove it."
        )
    return numbers
