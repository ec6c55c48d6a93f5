"""Smaller students made from a teacher: depth pruning."""

from oprd.compression.influence import Influence, choose_blocks, measure_influence
from oprd.compression.prune import prune
from oprd.compression.surgery import drop_blocks, layer_map_of

__all__ = ["Influence", "choose_blocks", "drop_blocks", "layer_map_of", "measure_influence", "prune"]
