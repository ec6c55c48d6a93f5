"""One forward of a backbone that shows chosen layers' states to a visitor, as they are computed.

The visitor is called inside the forward, layer by layer, and its result is all that is kept. So a loss term built there
sits, in the autograd graph, right behind its layer: its gradient is made when backward reaches that layer. Terms built
after the forward would each make a full-length zero-padded gradient before the first layer's backward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from oprd.models import backbone_of, decoder_layers
from oprd.states.views import Reading

T = TypeVar("T")


def visit_states(
    model: nn.Module, reading: Reading, layers: Sequence[int], visit: Callable[[int, Tensor], T]
) -> tuple[Tensor, dict[int, T]]:
    """Run the backbone once; call ``visit(layer, states [B, S, d])`` for each of ``layers``, ascending.

    Layer l is transformers' ``hidden_states[l]``: the output of block l, and for the last layer what the LM head reads,
    after the final norm. The LM head does not run. Works on any causal LM, PEFT-wrapped or not, with gradient
    checkpointing on or off: transformers checkpoints a block's ``forward``, so hooks run once, outside of what is
    recomputed.

    Returns:
        The last hidden states ``[B, S, d]`` (after the final norm) and the visitor's result per layer.

    Raises:
        ValueError: a layer outside ``1..L``.
    """
    backbone = backbone_of(model)
    blocks = decoder_layers(backbone)
    depth = len(blocks)
    outside = [layer for layer in layers if not 1 <= layer <= depth]
    if outside:
        raise ValueError(f"layers {outside} are outside 1..{depth}.")
    results: dict[int, T] = {}

    def hook_for(layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            results[layer] = visit(layer, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [blocks[layer - 1].register_forward_hook(hook_for(layer)) for layer in layers if layer < depth]
    try:
        output = backbone(input_ids=reading.ids_BS, attention_mask=reading.mask_BS.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    last_BSd = output.last_hidden_state
    if depth in layers:
        results[depth] = visit(depth, last_BSd)
    return last_BSd, results
