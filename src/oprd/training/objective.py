"""The training objective of one micro-batch: ``output * L_OPD + representation * L_OPRD + logit * L_logit`` (Eq. 7).

What is minimised, and what it asks of a teacher; `oprd.training.lessons` has the student's side. No trainer, no config object.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from oprd.bridge import Bridge
from oprd.states import Attending, Question, Rollout, TeacherStates, answer, autocast_dtype


@dataclass(frozen=True)
class Objective:
    """What is minimised. ``layers`` are 1-based student layers; the teacher's are the same or, with a ``bridge``, those of
    its layer map, or those of ``layer_map`` (one for each student layer), where the student has fewer layers.
    ``teacher_vocab_size`` is there where the tokenizers differ."""

    layers: tuple[int, ...]
    num_layers: int
    vocab_size: int
    representation_weight: float = 1.0
    representation_loss: str = "mse"
    transition_over: str = "positions"
    layer_weighting: str = "uniform"
    positions: str = "all"
    attention_weight: float = 0.0
    attention_layers: tuple[int, ...] = ()
    attention_keys: int = 64
    logit_weight: float = 0.0
    output_loss: str = "none"
    output_weight: float = 1.0
    output_top_k: int = 16
    top_k_support: str = "student"
    top_k_renormalize: bool = True
    temperature: float = 1.0
    teacher_vocab_size: int | None = None
    offload_targets: bool = False
    layer_map: tuple[int, ...] | None = None
    bridge: Bridge | None = field(default=None, repr=False)

    @property
    def uses_output(self) -> bool:
        return self.output_loss != "none" and self.output_weight != 0

    @property
    def uses_states(self) -> bool:
        """Whether hidden states are compared, or logits through them."""
        return self.representation_weight != 0 or self.logit_weight != 0 or self.attention_weight != 0

    @property
    def needs_means(self) -> bool:
        """Whether weights follow running means of what was measured at the layers."""
        return self.representation_weight != 0 and (self.layer_weighting != "uniform" or self.positions == "adaptive")

    @property
    def needs_transition_weights(self) -> bool:
        """Whether changes from one position to the next are compared."""
        return self.representation_loss == "transition" and self.transition_over != "layers"

    @property
    def uses_head(self) -> bool:
        """Whether some term sends gradient through the LM head's input (and to the head, if that is trained)."""
        return self.uses_output or self.logit_weight != 0

    @property
    def top_layer(self) -> int:
        """The highest block that any term reaches."""
        if self.uses_head:
            return self.num_layers
        layers = (*(self.layers if self.representation_weight else ()), *self.attention_layers)
        return max(layers, default=self.num_layers)


def question_of(objective: Objective, rollout: Rollout) -> Question:
    """What an objective asks of the teacher about one micro-batch; in the precision of the autocast that is on."""
    layers = objective.layers if objective.representation_weight else ()
    bridge, pairs, outputs = objective.bridge, rollout.state_pairs, rollout.output_pairs
    layer_map = bridge.layer_map if bridge else objective.layer_map
    prefix = rollout.prefix if objective.uses_output else None
    width = rollout.teacher.ids_BS.shape[1]
    return Question(
        rollout.teacher,
        pairs.teacher_places(width),
        {layer: layer_map[layer - 1] if layer_map else layer for layer in layers},
        bridge,
        last_at_states=bool(objective.logit_weight),
        output_places_N=outputs.teacher_places(width) if objective.uses_output else None,
        chain_places_E=None if prefix is None else prefix.chain_row_E * width + prefix.chain_column_E,
        attention=Attending(objective.attention_layers, objective.attention_keys)
        if objective.attention_weight
        else None,
        dtype=autocast_dtype(rollout.teacher.ids_BS.device),
    )


def teacher_states(objective: Objective, teacher: nn.Module, rollout: Rollout) -> TeacherStates:
    """One backbone forward of the teacher; keeps the supervised positions of the chosen layers."""
    return answer(teacher, question_of(objective, rollout), on_cpu=objective.offload_targets)
