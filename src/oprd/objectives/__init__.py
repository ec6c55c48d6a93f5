"""What is compared: pure functions of tensors. Nothing here knows a model, a config or a device."""

from oprd.objectives.attention_map import attention_map_loss, key_places, teacher_maps
from oprd.objectives.head_metric import head_grams, logit_mse, logit_mse_loss
from oprd.objectives.output_space import (
    full_vocab_kl,
    full_vocab_loss,
    sampled_token,
    sampled_token_loss,
    top_k_kl,
    top_k_loss,
)
from oprd.objectives.reduction import position_weights
from oprd.objectives.representation import (
    REPRESENTATION_KINDS,
    cosine_similarity,
    representation_distance,
    representation_loss,
)
from oprd.objectives.selection import map_layers, select_layers, select_positions
from oprd.objectives.streaming import Since, StateSums, state_term, transition_term
from oprd.objectives.transition import TRANSITION_OVER, previous_positions, transition_distance, with_previous
from oprd.objectives.weighting import LAYER_WEIGHTINGS, RunningMean, layer_weights

__all__ = [
    "LAYER_WEIGHTINGS",
    "REPRESENTATION_KINDS",
    "TRANSITION_OVER",
    "RunningMean",
    "Since",
    "StateSums",
    "attention_map_loss",
    "cosine_similarity",
    "full_vocab_kl",
    "full_vocab_loss",
    "head_grams",
    "key_places",
    "layer_weights",
    "logit_mse",
    "logit_mse_loss",
    "map_layers",
    "position_weights",
    "previous_positions",
    "representation_distance",
    "representation_loss",
    "sampled_token",
    "sampled_token_loss",
    "select_layers",
    "select_positions",
    "state_term",
    "teacher_maps",
    "top_k_kl",
    "top_k_loss",
    "transition_distance",
    "transition_term",
    "with_previous",
]
