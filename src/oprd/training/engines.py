"""What DDP, FSDP2 and DeepSpeed need of a run: settings that they cannot take, and where the frozen teacher lies."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from oprd import models
from oprd._compat import prepare_deepspeed
from oprd.states import TeacherElsewhere
from oprd.training.config import OPRDConfig
from oprd.training.teacher import Offloaded

logger = get_logger(__name__)

AtHand = Callable[[], AbstractContextManager[None]]


def zero_stage(args: OPRDConfig) -> int:
    """DeepSpeed's stage; 0 without DeepSpeed."""
    return 0 if args.deepspeed_plugin is None else int(args.deepspeed_plugin.zero_stage)


def fsdp_version(args: OPRDConfig) -> int:
    """1 or 2, from the arguments or from ``accelerate launch``; 0 without FSDP."""
    if args.fsdp_plugin_args is not None:
        return int(args.fsdp_plugin_args["fsdp_version"])
    is_on = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    return int(os.environ.get("FSDP_VERSION", "1")) if is_on else 0


def is_sharded(args: OPRDConfig) -> bool:
    """Whether no process holds the whole student."""
    return fsdp_version(args) > 0 or zero_stage(args) == 3


def check_engine(args: OPRDConfig, *, has_adapter: bool) -> None:
    """Settings that a sharded run cannot take.

    Raises:
        ValueError: with what to change.
    """
    version, stage = fsdp_version(args), zero_stage(args)
    if version == 1:
        raise ValueError("FSDP 1 flattens the LM head into its shards. Set fsdp_version: 2 in the accelerate config.")
    if stage and args.on_nonfinite == "skip":
        raise ValueError(
            "on_nonfinite: skip cannot be: DeepSpeed updates the weights as soon as it has the gradient. Use stop."
        )
    sharded = "FSDP" if version else "DeepSpeed ZeRO-3" if stage == 3 else None
    if args.offload_teacher and (version or stage):
        engine = "FSDP" if version else "DeepSpeed"
        raise ValueError(f"offload_teacher: {engine} places the teacher's weights itself. Unset offload_teacher.")
    if sharded is None:
        return
    if args.teacher_model_kind == "ema":
        raise ValueError(
            f"teacher_model_kind: ema averages whole weights, which {sharded} shards. Use base or live, or DDP or ZeRO-2."
        )
    if args.lm_head == "solved":
        raise ValueError(
            f"lm_head: solved writes the whole head at the end, which {sharded} shards. Use DDP or ZeRO-2."
        )
    if has_adapter:
        raise ValueError(f"LoRA under {sharded} cannot be merged into a model at the end. Use DDP or DeepSpeed ZeRO-2.")


def place_teacher(teacher: PreTrainedModel, args: OPRDConfig, accelerator: Accelerator) -> tuple[nn.Module, AtHand]:
    """The frozen teacher where it waits, wrapped as its engine wants, and what must be open while it is used.

    DDP and ZeRO-2 hold it whole on every process. FSDP2 and ZeRO-3 shard it; under both its LM head stays whole, since the
    student's losses read it. ``offload_teacher`` keeps it in main memory.

    Raises:
        ValueError: FSDP was asked for and is not there.
    """
    if fsdp_version(args) and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP was asked for and did not start: accelerate shards on GPUs and the like only. Use --accelerate_config "
            "multi_gpu, or remove fsdp from the recipe."
        )
    if isinstance(teacher, TeacherElsewhere):
        return teacher.place(accelerator.device), nullcontext
    if zero_stage(args):
        return prepare_deepspeed(teacher, accelerator), nullcontext
    if accelerator.is_fsdp2:
        return _sharded(teacher, accelerator), nullcontext
    here = not args.offload_teacher
    placed = accelerator.prepare_model(teacher, device_placement=here, evaluation_mode=True)
    return placed, Offloaded(teacher, accelerator.device).here if args.offload_teacher else nullcontext


def _sharded(teacher: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Each block a unit of FSDP2, in the student's precision: where that rounds the residual stream, a teacher that did not
    would be at a distance even from itself. Embeddings and LM head (often one tensor) stay whole."""
    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    how: dict[str, Any] = {
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    if mesh is not None:
        how["mesh"] = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    backbone = models.backbone_of(teacher)
    ends = (models.causal_lm(teacher).get_input_embeddings(), models.causal_lm(teacher).get_output_embeddings())
    for module in ends:
        module.to(accelerator.device)
    for block in models.decoder_layers(backbone):
        fully_shard(block, **how)
    fully_shard(backbone, ignored_params={p for module in ends for p in module.parameters()}, **how)
    return teacher


def lender_of(teacher: nn.Module) -> nn.Module:
    """What lends the teacher's LM head to the student's losses: the teacher, or a whole copy of a head in ZeRO-3's parts."""
    if not any(map(models.is_partitioned, models.head_parameters(teacher))):
        return teacher
    head = models.causal_lm(teacher).get_output_embeddings()
    with models.whole(*head.parameters()):
        bias = getattr(head, "bias", None)
        copies = (None if p is None else p.detach().clone() for p in (head.weight, bias))
        return models.LentHead(teacher.config, *copies)


def expose_head(student: nn.Module, args: OPRDConfig) -> None:
    """Tell ZeRO-3 that the student's forward reads its LM head's weights without calling the head."""
    if zero_stage(args) == 3:
        import deepspeed

        for parameter in models.head_parameters(student):
            deepspeed.zero.register_external_parameter(student, parameter)


def redirected(redirect: Callable, wrapper: nn.Module, model: nn.Module, method: Callable[[], Any]) -> Any:
    """``method()`` inside the wrapper's forward, so that DDP, FSDP2 and DeepSpeed gather and reduce.

    Of its results only the loss, the first of a tuple, goes through the wrapper, and no argument does: mixed-precision
    policies round the tensors that they find, and copy the containers. The loss keeps its gradient and its exact value.
    """
    kept: list[Any] = []

    def inner() -> Tensor | None:
        kept.append(method())
        return kept[0][0] if isinstance(kept[0], tuple) else None

    rounded, result = redirect(wrapper, model, inner), kept[0]
    if rounded is None:
        return result
    loss, *rest = result
    return rounded.to(loss.dtype) + (loss - rounded).detach(), *rest
