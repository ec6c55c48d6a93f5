"""Does it fit, and what would it cost: peak memory, FLOPs and tokens of a training step, before any weight is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from oprd.insight.simulate import Counts, Shapes, simulate
from oprd.objectives import select_layers
from oprd.training.objective import Objective

GB = 10**9
CONTEXT = 1.0 * GB  # what the driver and its libraries take of a GPU
FRAGMENTATION = 0.05  # of a GPU that the allocator cannot use
OPTIMIZER_BYTES = {  # of state per trainable byte; whatever is not named here is taken for AdamW
    "adafactor": 0.0,
    "sgd": 0.0,
    "lion_32bit": 1.0,
    "paged_lion_32bit": 1.0,
    "rmsprop": 1.0,
    "rmsprop_bnb": 1.0,
    "adagrad": 1.0,
}
ONE_STATE = ("lion", "rmsprop")  # of one number for each parameter
SHARDING = ("none", "zero2", "zero3", "fsdp")
WHOLE = ("fsdp", "zero3")  # shardings that split the weights themselves


@dataclasses.dataclass(frozen=True)
class Setup:
    """One way to run an update: shapes, objective, and who holds what.

    ``rows_generated``: responses that a process samples at once, of ``rows``' longest. ``in_vllm``: share of the GPU that vLLM
    keeps, asleep during the update with ``vllm_sleeps``; None where transformers generates.
    ``teacher_elsewhere``: `oprd serve-teacher` holds the teacher; only its head is here, if a loss needs it.
    ``teacher_is_student``: its weights are the student's. ``other_teachers``: bytes of weights of further teachers, and of
    their heads; ``readers``: teachers that read each micro-batch.
    """

    shapes: Shapes
    objective: Objective
    optim: str = "adamw_torch_fused"
    processes: int = 1
    sharding: str = "none"
    rows_generated: int = 1
    in_vllm: float | None = None
    vllm_sleeps: bool = False
    offload_teacher: bool = False
    teacher_in_8bit: bool = False
    teacher_elsewhere: bool = False
    teacher_is_student: bool = False
    other_teachers: tuple[float, float] = (0.0, 0.0)
    readers: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each GPU by what they are for, and FLOPs and tokens of one micro-batch.

    ``peak`` is the largest of three moments: generation, the teacher's forward, the student's forward and backward.
    ``activations`` is what the student's moment holds beside the teacher's targets.
    """

    setup: Setup
    gpu: float
    counts: Counts

    @property
    def student(self) -> float:
        return self._split(self.counts.student, *WHOLE)

    @property
    def gradients(self) -> float:
        """With several processes and no sharding DDP's buckets hold them once more."""
        copies = 2 if self.setup.processes > 1 and self.setup.sharding == "none" else 1
        return copies * self._split(self.counts.gradients, "zero2", *WHOLE)

    @property
    def optimizer(self) -> float:
        """State of the optimiser."""
        name = self.setup.optim
        states = 1.0 if any(part in name for part in ONE_STATE) else 2.0
        if "8bit" in name:
            size = self.counts.trainable * states
            if not name.startswith("adamw_torch"):  # bitsandbytes keeps those of embeddings in 32 bits
                size += self.counts.embeddings * states * 3
        else:
            size = self.counts.gradients * OPTIMIZER_BYTES.get(name, 2.0)
        return self._split(size, "zero2", *WHOLE)

    @property
    def teacher(self) -> float:
        """The teachers' weights while the student runs, and the bridge."""
        if self.setup.teacher_is_student:
            size = 0.0
        elif self.setup.teacher_elsewhere:
            size = float(self.counts.teacher_head if self.setup.objective.uses_head else 0)
        else:
            size = self.counts.teacher_head if self.setup.offload_teacher else self._teacher_held
        return size + self.counts.bridge + self._others

    @property
    def _others(self) -> float:
        """Of further teachers all weights, or the heads alone where the rest waits in main memory."""
        whole, heads = self.setup.other_teachers
        return heads if self.setup.offload_teacher else self._split(whole, *WHOLE)

    @property
    def targets(self) -> float:
        offloaded = self.counts.targets_by_layer if self.setup.objective.offload_targets else 0
        return self.setup.readers * (self.counts.targets - offloaded)

    @property
    def activations(self) -> float:
        """What the student's forward and backward hold at their peak; where weights are split, with the blocks that are gathered."""
        return self.counts.student_rise + self._gathered(self.counts.student, self.setup.shapes.student)

    @property
    def generation(self) -> float:
        """Keys and values of all responses that are sampled at once, or what vLLM keeps."""
        if self.setup.in_vllm is not None:
            return self.setup.in_vllm * self.gpu
        shapes, config = self.setup.shapes, self.setup.shapes.student.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = shapes.dtype.itemsize  # autocast leaves the cache in the weights' precision
        longest = max(map(sum, shapes.rows))
        return float(2 * config.num_hidden_layers * heads * size * width * longest * self.setup.rows_generated)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        always = self.student + self.optimizer
        kept = self.setup.in_vllm is not None and not self.setup.vllm_sleeps
        vllm = self.generation if kept else 0.0
        teacher = self.teacher
        if not self.setup.teacher_elsewhere:
            blocks = self._gathered(self._teacher_whole, self.setup.shapes.teacher)
            held = 0.0 if self.setup.teacher_is_student else self._teacher_held
            teacher = held + self.counts.bridge + self._others + self.counts.teacher_rise + blocks
        moments = [
            self.teacher + (0.0 if kept else self.generation),
            self.gradients + teacher,
            self.gradients + self.teacher + self.targets + self.activations,
        ]
        return always + vllm + max(moments)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves room for the driver and for the allocator's losses."""
        return self.peak <= self.room

    @property
    def room(self) -> float:
        """Bytes of the GPU that a run can use."""
        return self.gpu * (1 - FRAGMENTATION) - CONTEXT

    @cached_property
    def row(self) -> dict[str, Any]:
        """GB by category, and whether it fits."""
        names = ("student", "teacher", "gradients", "optimizer", "targets", "activations", "generation", "peak")
        sizes = {f"{name} GB" if name == "peak" else name: _short(getattr(self, name) / GB) for name in names}
        tokens = self.counts.tokens_student + self.counts.tokens_prefix
        return sizes | {
            "fits": "yes" if self.fits else "no",
            "TFLOP": _short(self.counts.flops / 1e12),
            "tokens": tokens,
            "with gradient": self.counts.tokens_student,
            "supervised": self.counts.tokens_supervised,
        }

    def _split(self, size: float, *by: str) -> float:
        return size / self.setup.processes if self.setup.sharding in by else float(size)

    def _gathered(self, size: float, config: PretrainedConfig) -> float:
        """Where weights are split two blocks at a time are whole, the one that runs and the next."""
        if self.setup.sharding not in WHOLE:
            return 0.0
        if (half := self.setup.shapes.autocast) is not None:
            size = size * half.itemsize / self.setup.shapes.dtype.itemsize
        return 2 * size / max(config.get_text_config().num_hidden_layers, 1)

    @property
    def _teacher_held(self) -> float:
        """FSDP2 splits the teacher's blocks and leaves embeddings and head whole; ZeRO-3 splits all, and a copy of the head
        is whole. Otherwise each GPU has all of it."""
        if self.setup.sharding == "zero3":
            return self._split(self._teacher_whole, "zero3") + self.counts.teacher_head
        tied = self.setup.shapes.teacher.get_text_config().tie_word_embeddings
        ends = self.counts.teacher_head * (1 if tied else 2)
        return ends + self._split(self._teacher_whole - ends, "fsdp")

    @property
    def _teacher_whole(self) -> float:
        size = self.counts.teacher
        if self.setup.teacher_in_8bit:
            dtype = self.setup.shapes.teacher_dtype or self.setup.shapes.dtype
            size -= self.counts.teacher_linear * (dtype.itemsize - 1)
        return float(size)


def _short(value: float) -> float:
    return float(f"{value:.3g}")


_COUNTED: dict[str, Counts] = {}  # the same shapes and objective are simulated once


def plan_setup(setup: Setup, gpu: float = 80 * GB) -> Plan:
    """The plan of one setup on a GPU of so many bytes.

    Raises:
        ValueError: an unknown sharding, or models that cannot be read as the shapes say.
    """
    if setup.sharding not in SHARDING:
        raise ValueError(f"sharding must be one of {', '.join(SHARDING)}, got {setup.sharding!r}.")
    counts = _counted(setup.shapes, setup.objective)
    if setup.sharding in WHOLE and setup.shapes.autocast is not None:
        # Blocks are gathered in half precision, where autocast would keep a cast of all weights.
        half = {"dtype": setup.shapes.autocast, "teacher_dtype": setup.shapes.autocast, "autocast": None}
        run = _counted(dataclasses.replace(setup.shapes, **half), setup.objective)
        kept = ("targets", "targets_by_layer", "teacher_rise", "student_rise")
        counts = counts._replace(**{name: getattr(run, name) for name in kept})
    return Plan(setup, gpu, counts)


def _counted(shapes: Shapes, objective: Objective) -> Counts:
    """Simulated once for the same shapes and objective."""
    objective = dataclasses.replace(objective, offload_targets=False)
    key = repr((shapes, objective))
    if key not in _COUNTED:
        _COUNTED[key] = simulate(shapes, objective)
    return _COUNTED[key]


def plan(
    student_config: PretrainedConfig,
    teacher_config: PretrainedConfig | None = None,
    *,
    rows: Sequence[tuple[int, int]] = ((512, 2048),),
    layers: str | Sequence[int] = "all",
    gpu: float = 80 * GB,
    objective: dict[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """Peak memory, FLOPs and tokens of an update, from shapes alone.

    Args:
        student_config, teacher_config: of any causal LM; the teacher is like the student if it is not given.
        rows: prompt and response tokens of each response of a micro-batch.
        layers: as in a recipe.
        gpu: bytes of one GPU.
        objective: fields of `Objective`, such as ``{"logit_weight": 1.0}`` or ``{"output_loss": "full"}``.
        settings: fields of `Shapes` and `Setup`: ``positions``, ``position_k``, ``gradient_scope``, ``is_packed``, ``dtype``,
            ``autocast``, ``optim``, ``processes``, ``sharding``, ...

    Raises:
        ValueError: an unknown setting, or shapes that cannot be compared.
    """
    student, teacher = student_config.get_text_config(), (teacher_config or student_config).get_text_config()
    known = {kind: {f.name for f in dataclasses.fields(kind)} for kind in (Shapes, Setup)}
    unknown = settings.keys() - known[Shapes] - known[Setup]
    if unknown:
        raise ValueError(
            f"Unknown settings {', '.join(sorted(unknown))}; there are {', '.join(sorted(known[Shapes] | known[Setup]))}."
        )
    shapes = {k: v for k, v in settings.items() if k in known[Shapes]}
    shapes["is_packed"] = shapes.get("is_packed", False) or shapes.get("gradient_scope") == "suffix"
    depth = student.num_hidden_layers
    chosen = Objective(
        tuple(select_layers(layers, depth)), depth, min(student.vocab_size, teacher.vocab_size), **(objective or {})
    )
    if chosen.representation_weight and shapes.get("bridge_rank") is None:
        own, other = ((c.num_hidden_layers, c.hidden_size) for c in (student, teacher))
        if own != other:
            raise ValueError(
                f"States of {own[0]} layers x {own[1]} and {other[0]} x {other[1]} are compared through a bridge only: give "
                "bridge_rank, or representation_weight 0."
            )
    setup = Setup(
        Shapes(student_config, teacher_config or student_config, tuple(map(tuple, rows)), **shapes),
        chosen,
        **{"rows_generated": len(rows), **{k: v for k, v in settings.items() if k in known[Setup]}},
    )
    return plan_setup(setup, gpu)
