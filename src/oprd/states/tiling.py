"""MLPs over tiles of tokens: what an MLP forms inside, several times the width of a state, exists for one tile at a time.

That is the largest thing an update holds beside its checkpoints. Without gradient tiles cost nothing. With gradient a tile is
recomputed in backward, and the recomputation of a checkpointed block stops in front of the MLP, because nothing behind
it is saved; the price is one more product with the last weight, which plain checkpointing never repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oprd.models import backbone_of, decoder_layers

TILE = 2048  # tokens: enough for a GPU's matrix products to run at full speed


class _Keep(torch.autograd.Function):
    """The identity, and the last tensor of a block that is saved for backward: torch stops recomputing right here."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, holder: list) -> Tensor:
        ctx.save_for_backward(states)
        holder.append(ctx)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Tiled(torch.autograd.Function):
    """``mlp(states)`` tile by tile. Saves nothing: the states come from `_Keep`, the weights from the module."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, run: Callable, tokens: int, holder: list, *weights: Tensor) -> Tensor:
        ctx.run, ctx.tokens, ctx.holder, ctx.weights = run, tokens, holder, weights
        device = states.device.type
        ctx.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return _in_tiles(run, states, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (states,) = ctx.holder.pop().saved_tensors
        grad_states = torch.empty_like(states)
        sums: list[Tensor] | None = None
        device = states.device.type
        precision = nullcontext() if ctx.autocast is None else torch.autocast(device, ctx.autocast)
        for part in _tiles(states, ctx.tokens):
            tile = states[:, part].detach().requires_grad_()
            with torch.enable_grad(), precision:
                output = ctx.run(tile)
            grad_states[:, part], *own = torch.autograd.grad(output, (tile, *ctx.weights), grad[:, part])
            if sums is None:
                sums = [g.float() for g in own]  # of many tiles
            else:
                for total in sums:
                    total.add_(own.pop(0))
            del output, own
        returned = [total.to(w.dtype) for total, w in zip(sums or (), ctx.weights, strict=True)]
        return grad_states, None, None, None, *returned


def _tiles(states: Tensor, tokens: int) -> list[slice]:
    return [slice(start, start + tokens) for start in range(0, states.shape[1], tokens)]


def _in_tiles(run: Callable, states: Tensor, tokens: int) -> Tensor:
    output: Tensor | None = None
    for part in _tiles(states, tokens):
        tile = run(states[:, part])
        if output is None:
            output = tile.new_empty(*states.shape[:2], tile.shape[-1])
        output[:, part] = tile
    return output


def _forward(
    mlp: nn.Module, run: Callable[[Tensor], Tensor], tokens: int, with_gradient: bool, states: Tensor
) -> Tensor:
    if torch.is_grad_enabled() and not with_gradient:
        return run(states)
    drops = mlp.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in mlp.modules())  # differs when run again
    if states.ndim != 3 or states.shape[:2].numel() <= tokens or drops:
        return run(states)
    row = states.flatten(0, 1).unsqueeze(0)
    if torch.is_grad_enabled():
        holder: list = []
        weights = [p for p in mlp.parameters() if p.requires_grad]
        if not row.requires_grad:  # `_Keep` saves nothing of what needs no gradient (adapters in the first MLP alone)
            row = row.detach().requires_grad_(bool(weights))
        output = _Tiled.apply(_Keep.apply(row, holder), run, tokens, holder, *weights)
    else:
        output = _in_tiles(run, row, tokens)
    return output.unflatten(1, states.shape[:2]).squeeze(0)


def tile_mlps(model: nn.Module, tokens: int = TILE, *, with_gradient: bool = False) -> int:
    """From now on the blocks' MLPs take so many tokens at a time; how many do. With gradient only if that is asked for.

    Only modules that blocks call ``mlp`` and that are one by name: each token by itself, a tensor in, a tensor out. Experts
    and the like stay as they are.
    """
    found = [getattr(block, "mlp", None) for block in decoder_layers(backbone_of(model))]
    mlps = [mlp for mlp in found if mlp is not None and type(mlp).__name__.endswith("MLP")]
    for mlp in mlps:
        run = mlp.forward.args[1] if isinstance(mlp.forward, partial) else mlp.forward
        mlp.forward = partial(_forward, mlp, run, tokens, with_gradient)
    return len(mlps)
