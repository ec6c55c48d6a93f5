"""The teacher: which one it is, loading its weights, and where they wait between uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_enabled

from oprd._compat import create_model_from_path
from oprd.lineage.hashing import combined_hash
from oprd.lineage.inputs import model_record
from oprd.models import backbone_of, causal_lm, resolve_path
from oprd.serving import RemoteTeacher, connect
from oprd.training.config import OPRDConfig
from oprd.training.source import Source


def open_teacher(given: Any, args: OPRDConfig) -> tuple[Any, Source]:
    """The teacher that a trainer was given or its settings name (a path or Hub id, a model, or one elsewhere), and where
    pre-flight reads about it.

    Raises:
        ValueError: none, two, or settings of its weights that cannot be.
    """
    if args.teacher_url is not None:
        if given is not None:
            raise ValueError("Two teachers: pass teacher_model or set teacher_url, not both.")
        given = connect(args.teacher_url, args.teacher_token_file)
    given = given if given is not None else args.teacher_model_name_or_path
    if given is None:
        raise ValueError("No teacher: pass teacher_model, or set teacher_model_name_or_path or teacher_url.")
    check_settings(args, is_path=isinstance(given, str))
    if isinstance(given, RemoteTeacher):
        if args.is_packed and given.why_not_packed:
            raise ValueError(f"{given.client.url}: {given.why_not_packed}")
        return given, Source(given.folder, has_weights=False)
    given = resolve_path(given) if isinstance(given, str) else given
    return given, Source(given, args.teacher_model_revision, args.trust_remote_code)


def teacher_record(args: OPRDConfig, student: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of the teacher that the settings name; of several, all of them under one name and one hash.

    Args:
        student: its record, which is the teacher's where it teaches itself.

    Raises:
        ValueError: there is no such teacher.
    """
    if args.teacher_model_kind is not None:
        return {**student, "kind": args.teacher_model_kind}
    if args.teachers is not None:
        each = {name: _record(**settings) for name, settings in args.teachers.items()}
        files = {name: record["hash"] + record.get("bridge", {}).get("hash", "") for name, record in each.items()}
        return {"name": " + ".join(each), "revision": None, "hash": combined_hash(files), "teachers": each}
    return _record(
        args.teacher_model_name_or_path, args.teacher_model_revision, args.teacher_url, args.teacher_token_file
    )


def _record(
    model_name_or_path: str | None = None,
    model_revision: str | None = None,
    url: str | None = None,
    token_file: str | None = None,
    bridge: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    record = connect(url, token_file).record if url is not None else model_record(model_name_or_path, model_revision)
    return record if bridge is None else {**record, "bridge": model_record(bridge)}


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
    if args.offload_teacher and args.teacher_load_in_8bit:
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
    kwargs["use_safetensors"] = True  # a pickle runs code when it is loaded
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
