"""What is asked of a teacher about one reading, and its answer: the teacher may be here or in another process.

Shapes: B sequences, S columns, N places, E chain steps, d width, r rank of a bridge. A place is ``row * S + column``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from oprd.objectives import teacher_maps
from oprd.states.attention_maps import AttentionObserver
from oprd.states.capture import visit_states
from oprd.states.views import Reading


class Projects(Protocol):
    """The teacher's side of a bridge."""

    def project_teacher(self, layer: int, states: Tensor) -> Tensor:
        """``[..., d] -> [..., r]`` for the partner of student layer ``layer``."""
        ...


@dataclass(frozen=True)
class Attending:
    """Of which layers attention maps are kept, at the places of states, on how many keys."""

    layers: tuple[int, ...]
    keys: int


@dataclass(frozen=True)
class Question:
    """What to read, and which states to keep of it.

    Args:
        state_places_N: where states are kept, of every layer asked for.
        layers: teacher layer of each student layer; keys name the answers. Empty for none.
        through: what each student layer's partner is projected by; None for the states themselves.
        last_at_states: whether the last states are kept at ``state_places_N`` too.
        output_places_N, chain_places_E: where else the last states are kept, if anywhere.
        attention: which attention maps are kept, if any.
        dtype: autocast's, which the layers' states are given in; None where autocast is off.
    """

    reading: Reading
    state_places_N: Tensor
    layers: Mapping[int, int] = field(default_factory=dict)
    through: Projects | None = field(default=None, repr=False)
    last_at_states: bool = False
    output_places_N: Tensor | None = None
    chain_places_E: Tensor | None = None
    attention: Attending | None = None
    dtype: torch.dtype | None = None

    @property
    def needs_last(self) -> bool:
        """Whether the states that the LM head reads are asked for."""
        return self.last_at_states or self.output_places_N is not None or self.chain_places_E is not None


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's states at the pairs, and nothing else: per student layer ``[N, d]`` (``[N, r]`` through a bridge), the
    last layer for the head, the last layer along sampled tokens that take several teacher tokens, and attention maps as
    log-probabilities ``[N, H, keys + 1]``."""

    layers: dict[int, Tensor]
    at_states: Tensor | None
    at_outputs: Tensor | None
    at_chains: Tensor | None = None
    maps: dict[int, Tensor] = field(default_factory=dict)


class TeacherElsewhere(nn.Module, ABC):
    """A frozen teacher whose backbone runs in another process. Here it has its ``config``, its ``generation_config``, the
    ``fingerprint`` and ``dtype`` of its weights and, once fetched, its LM head."""

    fingerprint: str
    dtype: torch.dtype

    @property
    @abstractmethod
    def has_head(self) -> bool:
        """Whether the LM head is here."""

    @property
    def base_model(self) -> nn.Module:
        """There is none here."""
        raise RuntimeError("The teacher's backbone runs elsewhere: ask it with oprd.states.answer.")

    @abstractmethod
    def answer(self, question: Question) -> TeacherStates:
        """What `answer` says of a model here; tensors in main memory."""

    @abstractmethod
    def fetch_head(self) -> None:
        """Bring the LM head here; until then its parameters have shapes and no content."""

    @abstractmethod
    def place(self, device: torch.device) -> TeacherElsewhere:
        """Where the LM head is to lie, now or once it is fetched."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that is on for a device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@torch.no_grad()
def answer(teacher: nn.Module, question: Question, *, on_cpu: bool = False) -> TeacherStates:
    """One backbone forward of the teacher, wherever it is; keeps the places asked for of the layers asked for.

    Args:
        on_cpu: leave the layers' states in main memory, pinned where there is a GPU.

    Raises:
        ValueError: a layer that the teacher does not have; whatever a teacher elsewhere refuses.
    """
    device = question.reading.ids_BS.device
    if isinstance(teacher, TeacherElsewhere):
        if question.attention is not None:
            raise ValueError(
                "A teacher elsewhere gives no attention maps. Set attention_weight: 0, or load the teacher here."
            )
        found = teacher.answer(question)
        rest = (found.at_states, found.at_outputs, found.at_chains)
        layers = {layer: _arrived(states, device, on_cpu) for layer, states in found.layers.items()}
        return TeacherStates(layers, *(None if states is None else states.to(device) for states in rest))
    readers: dict[int, list[int]] = {}  # teacher layer -> the student layers that are compared with it
    for layer, teacher_layer in question.layers.items():
        readers.setdefault(teacher_layer, []).append(layer)
    kept: dict[int, Tensor] = {}

    def visit(teacher_layer: int, states_BSd: Tensor) -> None:
        states_Nd = _at(states_BSd, question.state_places_N)
        for layer in readers[teacher_layer]:
            target_Nr = states_Nd if question.through is None else question.through.project_teacher(layer, states_Nd)
            # Autocast keeps the residual stream in float32; as targets, its half precision is a thousand times finer than
            # what is left between student and teacher.
            kept[layer] = _held(target_Nr if question.dtype is None else target_Nr.to(question.dtype), on_cpu)

    observer = (
        None if question.attention is None else AttentionObserver(question.attention.layers, partial(_maps, question))
    )
    top_layer = None if question.needs_last else max((*readers, *(observer.layers if observer else ())))
    last_BSd, _ = visit_states(teacher, question.reading, sorted(readers), visit, top_layer=top_layer, attend=observer)
    places = (
        question.state_places_N if question.last_at_states else None,
        question.output_places_N,
        question.chain_places_E,
    )
    rest = (None if place is None else _at(last_BSd, place) for place in places)
    return TeacherStates(kept, *rest, {} if observer is None else observer.results)


def _maps(
    question: Question, layer: int, query_PHh: Tensor, key_PGh: Tensor, scaling: float, window: int | None
) -> Tensor:
    place_N = question.state_places_N
    position_N = question.reading.position_of(place_N)
    return teacher_maps(query_PHh, key_PGh, place_N, position_N, question.attention.keys, scaling, window)


def _at(states_BSd: Tensor, places_N: Tensor) -> Tensor:
    return states_BSd.flatten(0, 1).index_select(0, places_N)


def _held(states: Tensor, on_cpu: bool) -> Tensor:
    """The states as they wait for the student: where they are, or in main memory."""
    if not on_cpu:
        return states
    held = torch.empty_like(states, device="cpu", pin_memory=states.is_cuda)
    return held.copy_(states, non_blocking=True)


def _arrived(states: Tensor, device: torch.device, on_cpu: bool) -> Tensor:
    if not on_cpu:
        return states.to(device)
    return states.pin_memory() if device.type == "cuda" else states
