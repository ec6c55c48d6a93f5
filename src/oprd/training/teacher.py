"""The teacher's weights: loading them, and where they wait between uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_enabled

from oprd._compat import create_model_from_path
from oprd.models import backbone_of, causal_lm
from oprd.training.config import OPRDConfig


def check_settings(args: OPRDConfig, *, is_path: bool) -> None:
    """Settings of the teacher's weights that cannot be.

    Raises:
        ValueError: with what to change.
    """
    if not is_path and (args.teacher_model_init_kwargs or args.teacher_model_revision or args.teacher_load_in_8bit):
        raise ValueError(
            "teacher_model_init_kwargs, teacher_model_revision and teacher_load_in_8bit would be ignored: the teacher is "
            "already a model."
        )
    if args.teacher_load_in_8bit:
        if find_spec("bitsandbytes") is None:
            raise ValueError('teacher_load_in_8bit needs bitsandbytes: pip install "oprd[quantized]", or unset it.')
        if (args.teacher_model_init_kwargs or {}).get("quantization_config") is not None:
            raise ValueError("The teacher is quantised twice: unset teacher_load_in_8bit or quantization_config.")
    if args.offload_teacher:
        sharded = "FSDP" if args.fsdp else "DeepSpeed" if args.deepspeed_plugin is not None else None
        if sharded:
            raise ValueError(f"offload_teacher: {sharded} places the teacher's weights itself. Unset offload_teacher.")
        if args.teacher_load_in_8bit:
            raise ValueError("Weights of 8 bits stay on the GPU: unset offload_teacher or teacher_load_in_8bit.")


def load_teacher(path: str, args: OPRDConfig, dtype: torch.dtype, num_processes: int) -> PreTrainedModel:
    """The teacher from its path, in the student's ``dtype`` unless ``teacher_model_init_kwargs`` says otherwise.

    Raises:
        ValueError: FSDP that loads weights on one process alone, which only a sharded model gets over.
    """
    if num_processes > 1 and is_fsdp_enabled():
        raise ValueError(
            "The teacher is not sharded, and with fsdp_cpu_ram_efficient_loading one process alone would load it. Set that to "
            "false in the accelerate config."
        )
    kwargs = dict(args.teacher_model_init_kwargs or {})
    # States are compared: a teacher in bf16 keeps its residual stream in bf16 too, and even the student's own weights
    # would then be a teacher at a distance. The student's dtype, under the same autocast, has no such floor.
    kwargs.setdefault("dtype", dtype)
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    if num_processes > 1 or args.offload_teacher:
        kwargs["device_map"] = None  # a split teacher cannot be one process's share, nor wait in main memory
    if args.teacher_load_in_8bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)  # never of the head, which may be adopted
        if num_processes > 1 or args.device.type != "cpu":
            kwargs["device_map"] = {"": args.device}
    return create_model_from_path(path, **kwargs)


class Offloaded:
    """A frozen model whose backbone waits in main memory (pinned, where there is a GPU) and is copied in for a use.

    The LM head stays on the device: the student's losses read it later. Nothing is ever copied back.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        head = causal_lm(model).get_output_embeddings()
        stays = {id(p) for p in head.parameters()}
        for parameter in head.parameters():
            parameter.data = parameter.data.to(device)
        backbone = backbone_of(model)
        self._tensors = [t for t in (*backbone.parameters(), *backbone.buffers()) if id(t) not in stays]
        self._home = [self._park(t.data) for t in self._tensors]
        self._leave()

    def _park(self, tensor: Tensor) -> Tensor:
        home = tensor.cpu()
        return home.pin_memory() if self._device.type == "cuda" else home

    def _leave(self) -> None:
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = home

    @contextmanager
    def here(self) -> Iterator[None]:
        """The weights are on the device inside."""
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = home.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()
