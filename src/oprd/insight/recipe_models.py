"""The models of a recipe as a plan needs them: their configs alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from oprd.model_files import check_model
from oprd.models import resolve_path
from oprd.training.config import OPRDConfig
from oprd.training.source import Source
from oprd.training.teachers import Routes, named_teachers


def teachers_of(
    args: OPRDConfig, student: PretrainedConfig, notes: list[str]
) -> tuple[PretrainedConfig, OPRDConfig, list[PretrainedConfig], int]:
    """The largest teacher, the settings as they are for it, the other teachers, and how many read a micro-batch."""
    if args.teacher_prompt_template is not None:
        notes.append("the teacher's prompts as long as the student's: privileged text comes on top")
    if args.teacher_model_kind is not None:
        return student, args, [], 1
    named = named_teachers(args)
    if any(one.args.teacher_url is not None for one in named):
        notes.append("teachers at a url take no memory here")
        named = [one for one in named if one.args.teacher_url is None]
    if not named or any(one.args.teacher_model_name_or_path is None for one in named):
        raise ValueError("A plan needs both models: set model_name_or_path and teacher_model_name_or_path.")
    configs = [
        config_of(
            "teacher_model_name_or_path",
            one.args.teacher_model_name_or_path,
            one.args.teacher_model_revision,
            args.trust_remote_code,
        )
        for one in named
    ]
    sizes = [weights_of([config], torch.float32)[0] for config in configs]
    largest = sizes.index(max(sizes))
    others = [config for place, config in enumerate(configs) if place != largest]
    routed = Routes.of(named, args.teacher_column) is not None
    if others:
        notes.append(
            f"of {len(configs)} teachers the largest reads " + ("the rows" if routed else "every row, as the others do")
        )
    return configs[largest], named[largest].args, others, 1 if routed else len(configs)


def weights_of(configs: list[PretrainedConfig], dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of these models, and of their LM heads."""
    whole = heads = 0.0
    for config in configs:
        with torch.device("meta"):
            found = AutoModelForCausalLM.from_config(config)
        whole += dtype.itemsize * sum(p.numel() for p in found.parameters())
        heads += dtype.itemsize * found.get_output_embeddings().weight.numel()
    return whole, heads


def config_of(key: str, name: str, revision: str | None, trust_remote_code: bool) -> PretrainedConfig:
    """The config of the model that a key names.

    Raises:
        ValueError: there is none.
    """
    role = "teacher" if key.startswith("teacher") else "student"
    if Path(resolve_path(name)).exists():
        check_model(resolve_path(name), role, trust_remote_code=trust_remote_code, weights=False)
    try:
        return Source(resolve_path(name), revision, trust_remote_code).config
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{key}: {name} is no folder with a config.json here, and the Hub has not given it: {reason}"
        ) from error
