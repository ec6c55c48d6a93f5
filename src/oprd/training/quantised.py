"""A student whose weights are quantised (bitsandbytes, 4 or 8 bits) and which trains by LoRA: what it needs, how it is kept.

Merging adapters into quantised weights would round them away again, so the student stays what it is: quantised weights and
adapters beside them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_quantization_config

from oprd.models import causal_lm, resolve_path
from oprd.training.source import Source

logger = get_logger(__name__)

ADAPTER = "adapter_config.json"


def check_quantised(args: Any, model: ModelConfig, *, second_stage: bool = False) -> None:
    """Settings of a quantised student that go together.

    Raises:
        ValueError: with what to change.
    """
    bits = "load_in_4bit" if model.load_in_4bit else "load_in_8bit" if model.load_in_8bit else None
    asked = {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False, "bnb_4bit_quant_storage": None}
    changed = [name for name, default in asked.items() if getattr(model, name) != default]
    if changed and not model.load_in_4bit:
        raise ValueError(f"{', '.join(changed)} would be ignored: load_in_4bit is off. Set load_in_4bit: true.")
    folder = Path(resolve_path(model.model_name_or_path or ""))
    if model.model_name_or_path and (folder / ADAPTER).is_file() and (folder / "config.json").is_file():
        raise ValueError(
            f"The student {folder} is a whole model with an adapter beside it, such as a quantised run leaves in final/. It can "
            "be evaluated and be a teacher, not be trained on. Name the model that it was quantised from."
        )
    if bits is None:
        return
    if not model.use_peft:
        raise ValueError(
            f"{bits}: true leaves weights that cannot be trained. Set use_peft: true (and lora_target_modules: all-linear), which "
            f"trains adapters beside them, or unset {bits}."
        )
    if args.use_vllm:
        raise ValueError(
            f"use_vllm: true needs the adapters merged for every rollout, and in the quantised weights of {bits}: true each "
            "merge would leave its rounding behind. Unset one of the two."
        )
    if second_stage:
        raise ValueError(
            f"then: with {bits}: true the first stage ends with a quantised student and adapters, which cannot be trained on. "
            f"Remove then or {bits}."
        )


def check_origin(student: Source) -> None:
    """A student is quantised when it is loaded, not before: what was loaded quantised transformers cannot save again (seen
    in 5.23), which would show after the last step.

    Raises:
        ValueError: its files hold weights that bitsandbytes has quantised.
    """
    found = getattr(student.config, "quantization_config", None) if student.is_path else None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if getattr(method, "value", method) == "bitsandbytes":
        raise ValueError(
            f"The student {student.model} is quantised in its files, and could not be saved again. Name the model that it was "
            "quantised from, with load_in_4bit or load_in_8bit."
        )


def quantization_of(args: Any, model: ModelConfig) -> BitsAndBytesConfig | None:
    """TRL's, computing in bf16 where the forward does: beside ``bf16: true`` the weights' own float32 would be slow."""
    config = get_quantization_config(model)
    if config is not None and model.load_in_4bit and args.bf16 and model.dtype in (None, "float32"):
        config.bnb_4bit_compute_dtype = torch.bfloat16
    return config


def is_quantised(model: nn.Module) -> bool:
    """Whether bitsandbytes holds its weights."""
    lm = causal_lm(model)
    return bool(getattr(lm, "is_loaded_in_4bit", False) or getattr(lm, "is_loaded_in_8bit", False))


def widen_adapters(model: nn.Module) -> None:
    """Adapters of a quantised model in float32. TRL makes them bf16, in which an update of AdamW at the learning rates of
    distillation is often too small to change a weight; they are the only weights that train."""
    if is_quantised(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def save_with_adapters(model: Any, directory: Path, *, goes_on: bool) -> None:
    """The quantised model and its adapters in one folder, which ``AutoModelForCausalLM.from_pretrained`` loads together.

    Args:
        model: a PEFT model on quantised weights; its adapters are taken off it unless training ``goes_on``.
    """
    logger.info(
        "The student is saved as its quantised weights and the adapters beside them, not merged: merging would round the "
        "adapters away. AutoModelForCausalLM.from_pretrained loads both; bitsandbytes and peft must be installed."
    )
    whole = copy.deepcopy(model) if goes_on else model
    whole.save_pretrained(directory)  # the adapters
    (directory / "README.md").unlink(missing_ok=True)  # peft's, a form to fill in
    whole.unload().save_pretrained(directory)
