"""One update on fake tensors: the training code itself runs, at any size, in seconds and without weights.

What is counted is what that code allocates, so a plan cannot drift away from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig

from oprd import models
from oprd.insight.live_bytes import LiveBytes
from oprd.objectives import map_layers, position_weights, projection, select_positions, with_previous
from oprd.states import (
    Rollout,
    make_rollout,
    only,
    pack,
    tile_mlps,
    use_observed_attention,
    use_packed_attention,
)
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, teacher_states


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What an update's size depends on, beside the objective.

    ``rows``: prompt and response tokens of each response of the micro-batch. ``dtype``: of the student's weights and, unless
    ``teacher_dtype`` says otherwise, of the teacher's; ``autocast`` of the forward (None: that of the weights). ``lm_head``: as
    settled, not ``auto``. ``on_gpu``: chunks of logits are as large as they are there.
    """

    student: PretrainedConfig
    teacher: PretrainedConfig
    rows: tuple[tuple[int, int], ...]
    positions: str = "all"
    position_k: int | None = None
    state_at: str = "predictive"
    gradient_scope: str = "full"
    is_packed: bool = False
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    gradient_checkpointing: bool = True
    lm_head: str = "keep"
    trainable: str = "all"
    tile_mlp: bool = False
    peft: Any = None
    bridge_rank: int | None = None
    on_gpu: bool = False


class Counts(NamedTuple):
    """Bytes, FLOPs and tokens of one micro-batch's update.

    ``student``, ``teacher``, ``gradients``: what they hold, ``trainable`` of it in parameters; ``teacher_linear``: parameters in
    linear maps of the teacher's backbone; ``teacher_head``: bytes of its head; ``embeddings``: trainable parameters of input
    embeddings. ``targets``: the teacher's states while the student runs, ``targets_by_layer`` of it
    what a layer is compared with. ``teacher_rise``, ``student_rise``: the most bytes that either forward (and backward) had
    alive above all that.
    """

    student: int
    teacher: int
    teacher_linear: int
    teacher_head: int
    embeddings: int
    gradients: int
    trainable: int
    bridge: int
    targets: int
    targets_by_layer: int
    teacher_rise: int
    student_rise: int
    flops: int
    tokens_student: int
    tokens_prefix: int
    tokens_teacher: int
    tokens_supervised: int


def layout(shapes: Shapes, objective: Objective, device: str = "cpu") -> Rollout:
    """The rollout of a micro-batch with these lengths, on real index tensors (a few bytes a token)."""
    prompts, responses = zip(*shapes.rows, strict=True)
    prompt_mask, completion_mask = (
        torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
        for lengths in (prompts, responses)
    )
    positions = "all" if shapes.positions == "adaptive" else shapes.positions
    supervised = select_positions(completion_mask, positions, shapes.position_k)
    rollout = make_rollout(
        torch.zeros_like(prompt_mask, dtype=torch.long),
        prompt_mask,
        torch.zeros_like(completion_mask, dtype=torch.long),
        completion_mask,
        state_weights_BC=position_weights(supervised),
        output_weights_BC=position_weights(completion_mask),
        transition_weights_BC=position_weights(with_previous(supervised))
        if objective.needs_transition_weights
        else None,
        state_at=shapes.state_at,
    )
    rollout = only(rollout, states=objective.uses_states, outputs=objective.uses_output)
    return pack(rollout, suffix=shapes.gradient_scope == "suffix") if shapes.is_packed else rollout


def simulate(shapes: Shapes, objective: Objective) -> Counts:
    """Teacher forward, student forward and backward, with gradients already there from a micro-batch before."""
    rollout = layout(shapes, objective)
    mode = FakeTensorMode()
    with torch.device("meta"):  # nothing is initialised
        student, teacher = (
            _model(config, shapes, dtype)
            for config, dtype in (
                (shapes.student, shapes.dtype),
                (shapes.teacher, shapes.teacher_dtype or shapes.dtype),
            )
        )
        teacher.requires_grad_(False).eval()
        tile_mlps(teacher)
        tile_mlps(student, with_gradient=shapes.tile_mlp)
        student = _prepared(student, shapes, objective)
        for model in (student, teacher) if objective.attention_weight else ():
            use_observed_attention(model)
    with mode:
        for model in (student, teacher):
            _take_shape(model)
        trained = [p for p in student.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        rollout = as_fake(rollout, mode)
        precision = nullcontext() if shapes.autocast is None else torch.autocast("cpu", shapes.autocast)
        maps = None
        if shapes.bridge_rank is not None:
            maps = _Maps(shapes.student, shapes.teacher, shapes.bridge_rank)
            objective = dataclasses.replace(objective, bridge=maps)
        with _Flops() as flops, _chunks(shapes.on_gpu):
            with LiveBytes() as before, precision:
                targets = teacher_states(objective, teacher, rollout)
            with LiveBytes() as memory:
                with precision:
                    loss = student_loss(objective, student, teacher, rollout, targets)[0]
                loss.backward()
    return Counts(
        student=_bytes([*student.parameters(), *student.buffers()]),
        teacher=_bytes([*teacher.parameters(), *teacher.buffers()]),
        teacher_linear=sum(m.weight.numel() for m in models.backbone_of(teacher).modules() if isinstance(m, nn.Linear)),
        teacher_head=_bytes([*models.causal_lm(teacher).get_output_embeddings().parameters()]),
        embeddings=sum(
            p.numel() for p in models.causal_lm(student).get_input_embeddings().parameters() if p.requires_grad
        ),
        gradients=_bytes([p.grad for p in trained]),
        trainable=sum(p.numel() for p in trained),
        bridge=0 if maps is None else maps.bytes,
        targets=before.live,
        targets_by_layer=_bytes([*targets.layers.values()]),
        teacher_rise=before.peak,
        student_rise=memory.peak,
        flops=flops.total,
        tokens_student=rollout.student.ids_BS.numel(),
        tokens_prefix=0 if rollout.student_prefix is None else rollout.student_prefix.ids_BS.numel(),
        tokens_teacher=rollout.teacher.ids_BS.numel(),
        tokens_supervised=max(len(rollout.state_pairs), len(rollout.output_pairs)),
    )


class _Flops(TorchDispatchMode):
    """FLOPs of matrix products and attention. torch's own counter follows modules too, and its hooks keep what a
    checkpointed block recomputes alive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet in ATTENTION_ON_CPU:
            query, key, value = args[ATTENTION_ON_CPU[packet] :][:3]
            passes = 2 if ATTENTION_ON_CPU[packet] == 0 else 5  # products of that size, as on other devices
            self.total += passes * 2 * query.shape[:3].numel() * key.shape[2] * (query.shape[3] + value.shape[3]) // 2
        return out


# Where the query stands among the arguments: behind the gradient in backward.
ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 0,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,
}


class _Maps:
    """What `oprd.bridge.Bridge` does to shapes."""

    def __init__(self, student: PretrainedConfig, teacher: PretrainedConfig, rank: int) -> None:
        depths, widths = zip(*((c.num_hidden_layers, c.hidden_size) for c in (student, teacher)), strict=True)
        self.layer_map = map_layers(*depths)
        self._student, self._teacher = (torch.empty(depths[0], rank, width) for width in widths)
        self.bytes = _bytes([self._student, self._teacher])

    def project_student(self, layer: int, states: Tensor) -> Tensor:
        return (states.float() - 0.0) @ self._student[layer - 1].T

    def project_teacher(self, layer: int, states: Tensor) -> Tensor:
        return (states.float() - 0.0) @ self._teacher[layer - 1].T


@contextmanager
def _chunks(on_gpu: bool) -> Iterator[None]:
    """Chunks of logits as on a GPU, though the tensors say CPU."""
    before = projection.CPU_COPY_BYTES
    projection.CPU_COPY_BYTES = projection.COPY_BYTES if on_gpu else before
    try:
        yield
    finally:
        projection.CPU_COPY_BYTES = before


def _model(config: PretrainedConfig, shapes: Shapes, dtype: torch.dtype | None = None) -> nn.Module:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or shapes.dtype)
    model.tie_weights()
    if shapes.is_packed:
        use_packed_attention(model)
    return model


def _take_shape(model: nn.Module) -> None:
    """Fake tensors on the CPU in place of those on the meta device, shared ones once."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            held.update({name: fake(value) for name, value in held.items() if isinstance(value, Tensor)})


def _prepared(student: nn.Module, shapes: Shapes, objective: Objective) -> nn.Module:
    """As the trainer prepares it: adapters, checkpointing, and no gradient where no loss reaches."""
    if shapes.gradient_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    if shapes.peft is not None:
        from peft import get_peft_model

        student = get_peft_model(student, shapes.peft)
        if shapes.gradient_checkpointing:
            models.causal_lm(student).enable_input_require_grads()
    head = models.causal_lm(student).get_output_embeddings()
    if shapes.trainable == "head":
        student.requires_grad_(False)
        head.requires_grad_(True)
    models.freeze_unreachable(student, top_layer=objective.top_layer, head=objective.uses_head)
    if shapes.lm_head == "freeze":
        head.requires_grad_(False)
    return student.train()


def as_fake(value: Any, mode: FakeTensorMode) -> Any:
    """The same with fake tensors in place of real ones, through dataclasses."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: as_fake(getattr(value, f.name), mode) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind them, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
