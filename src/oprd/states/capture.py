"""One forward of a backbone that shows chosen layers' states to a visitor, as they are computed.

The visitor is called inside the forward, layer by layer, and its result is all that is kept. So a loss term built there
sits, in the autograd graph, right behind its layer: its gradient is made when backward reaches that layer. Terms built
after the forward would each make a full-length zero-padded gradient before the first layer's backward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from oprd.models import backbone_of, decoder_layers
from oprd.states.attention import ARGUMENT, Packing, no_mask
from oprd.states.attention_maps import AttentionObserver
from oprd.states.views import Reading

T = TypeVar("T")


def visit_states(
    model: nn.Module,
    reading: Reading,
    layers: Sequence[int],
    visit: Callable[[int, Tensor], T],
    *,
    prefix: Reading | None = None,
    top_layer: int | None = None,
    attend: AttentionObserver | None = None,
) -> tuple[Tensor, dict[int, T]]:
    """Run the backbone once; call ``visit(layer, states [B, S, d])`` for each of ``layers``, ascending.

    Layer l is transformers' ``hidden_states[l]``: the output of block l, and for the last layer what the LM head reads,
    after the final norm. The LM head does not run. Works on any causal LM, PEFT-wrapped or not, with gradient
    checkpointing on or off: transformers checkpoints a block's ``forward``, so hooks run once, outside of what is
    recomputed.

    Args:
        prefix: what was read of a packed ``reading``'s documents before it; runs first, without gradient, and its keys
            and values are constants.
        top_layer: blocks above it do not run; all do by default.
        attend: sees the queries and keys of its layers in this forward, and keeps what its own visitor makes of them. The
            model has been given `use_observed_attention`.

    Returns:
        The last hidden states ``[B, S, d]`` (after the final norm; of no meaning if blocks were left out) and the
        visitor's result per layer.

    Raises:
        ValueError: a layer outside ``1..L``, or above ``top_layer``; attention that is asked for and not shown; keys before
            a ``prefix``'s end, which an observer would not see.
    """
    backbone = backbone_of(model)
    blocks = decoder_layers(backbone)
    depth = len(blocks)
    top_layer = depth if top_layer is None else top_layer
    outside = [layer for layer in (*layers, *(attend.layers if attend else ())) if not 1 <= layer <= top_layer]
    if outside:
        raise ValueError(f"layers {outside} are outside 1..{top_layer}.")
    if attend is not None and prefix is not None:
        raise ValueError("Attention maps need the keys of whole documents. Set gradient_scope: full.")
    results: dict[int, T] = {}
    memory: dict[int, Any] | None = None
    with _up_to(backbone, blocks, top_layer):
        if prefix is not None:
            memory = {}
            with torch.no_grad():
                _read(backbone, prefix, {}, writes=memory)

        def hook_for(layer: int):
            def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
                results[layer] = visit(layer, output[0] if isinstance(output, tuple) else output)

            return hook

        handles = [blocks[layer - 1].register_forward_hook(hook_for(layer)) for layer in layers if layer < depth]
        try:
            with nullcontext({}) if attend is None else attend.during_forward_of(model) as arguments:
                last_BSd = _read(backbone, reading, arguments, reads=memory)
        finally:
            for handle in handles:
                handle.remove()
    if depth in layers:
        results[depth] = visit(depth, last_BSd)
    return last_BSd, results


@torch.no_grad()
def read_one_token(model: nn.Module, reading: Reading, top_layer: int) -> None:
    """As many calls of every block as a process makes that reads a prefix: shards are gathered by all processes at once."""
    first = Reading(reading.ids_BS[:, :1], reading.mask_BS[:, :1], reading.positions_BS[:, :1], (1,))
    visit_states(model, first, (), lambda *_: None, top_layer=top_layer)


def _read(backbone: nn.Module, reading: Reading, arguments: dict[str, Any], **memory: dict[int, Any] | None) -> Tensor:
    """Last hidden states ``[B, S, d]`` of one reading."""
    if not reading.is_packed:
        arguments = arguments | {"attention_mask": reading.mask_BS.long()}
    else:
        arguments = arguments | {
            "attention_mask": no_mask(reading.ids_BS.device),
            "position_ids": reading.positions_BS,
            ARGUMENT: Packing(reading.lengths, **memory),
        }
    return backbone(input_ids=reading.ids_BS, use_cache=False, **arguments).last_hidden_state


@contextmanager
def _up_to(backbone: nn.Module, blocks: nn.ModuleList, top_layer: int) -> Iterator[None]:
    """Leave out the blocks above ``top_layer``. What backward recomputes is a block, so they may be back by then."""
    if top_layer == len(blocks):
        yield
        return
    owner, name = next(
        (module, name) for module in backbone.modules() for name, child in module.named_children() if child is blocks
    )
    setattr(owner, name, blocks[:top_layer])
    try:
        yield
    finally:
        setattr(owner, name, blocks)
