"""Taking blocks out of a model: the modules, their numbers, and the config that has to build the same again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PretrainedConfig

from oprd.models import LAYER_MAP, backbone_of, decoder_layers, recorded_layer_map, text_config

# What configs say of single layers. A rule that is not here (every n-th layer, say) shows when the student is loaded again.
ONE_A_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers", "indexer_types")
INDICES = ("mlp_only_layers", "moe_layers", "rope_scaling_layers", "cross_attention_layers")  # from 0
FIRST = ("first_k_dense_replace",)  # how many at the start


def drop_blocks(model: nn.Module, kept: Sequence[int]) -> None:
    """Keep the blocks with these 1-based numbers and no others, in place.

    Attention modules are numbered anew, because the generation cache is found by that number; per-layer lists of the
    config are cut along. The config records which layers of the original the student's stand for (`layer_map_of`).

    Raises:
        ValueError: layers that are outside, out of order, or all of them.
    """
    config, backbone = text_config(model), backbone_of(model)
    blocks = decoder_layers(backbone)
    depth = len(blocks)
    check_kept(kept, depth)
    layer_map = layer_map_of(kept, depth, recorded_layer_map(config))
    owner, name = next(
        (module, name) for module in backbone.modules() for name, child in module.named_children() if child is blocks
    )
    setattr(owner, name, nn.ModuleList(blocks[layer - 1] for layer in kept))
    for index, block in enumerate(getattr(owner, name)):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    _cut_config(config, kept, depth)
    setattr(config, LAYER_MAP, layer_map)


def check_kept(kept: Sequence[int], depth: int) -> None:
    """1-based layers that a model of this depth can be left with.

    Raises:
        ValueError: layers that are outside, out of order, or all of them.
    """
    outside = [layer for layer in kept if not 1 <= layer <= depth]
    if outside or not kept:
        raise ValueError(f"Layers to keep lie in 1..{depth}, got {', '.join(map(str, outside)) or 'none'}.")
    if list(kept) != sorted(set(kept)):
        raise ValueError(f"Layers to keep must ascend, each once, got {', '.join(map(str, kept))}.")
    if len(kept) == depth:
        raise ValueError(f"All {depth} layers would be kept, and nothing pruned. Leave one out.")


def layer_map_of(kept: Sequence[int], depth: int, before: Sequence[int] | None = None) -> list[int]:
    """Entry i - 1 is the original's layer that the student's layer i is compared with: the kept block's own number and,
    for the last layer, the original's last, since that is what the LM head reads.

    Args:
        before: the map of a model that was pruned already; the result then leads to that model's original.
    """
    layers = [*kept[:-1], depth]
    return layers if before is None else [before[layer - 1] for layer in layers]


def _cut_config(config: PretrainedConfig, kept: Sequence[int], depth: int) -> None:
    """``num_hidden_layers`` first: configs check their lists against it when they are written."""
    said = config.to_dict()
    config.num_hidden_layers = len(kept)
    for name in ONE_A_LAYER:
        if isinstance(said.get(name), list) and len(said[name]) == depth:
            setattr(config, name, [said[name][layer - 1] for layer in kept])
    for name in INDICES:
        if isinstance(said.get(name), list):
            setattr(config, name, [index for index, layer in enumerate(kept) if layer - 1 in said[name]])
    for name in FIRST:
        if isinstance(said.get(name), int):
            setattr(config, name, sum(layer <= said[name] for layer in kept))
