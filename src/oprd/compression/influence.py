"""How much each block of a model changes what passes through it (ShortGPT's block influence, arXiv 2403.03853, Eq. 1).

Shapes: B sequences, S columns, L blocks, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oprd.models import backbone_of, decoder_layers
from oprd.states import Reading


@dataclass(frozen=True)
class Influence:
    """``values[l - 1] = 1 - mean cos(h_in, h_out)`` of block l, over ``positions`` real positions."""

    values: tuple[float, ...]
    positions: int


@torch.no_grad()
def measure_influence(model: nn.Module, readings: Iterable[Reading]) -> Influence:
    """The influence of every block, from one forward of the backbone for each reading; nothing but sums is kept.

    The state that leaves the last block is taken before the final norm. Cosines are taken in float32 and summed in
    float64.

    Raises:
        ValueError: no position to measure at; blocks whose states are not ``[B, S, d]``; states that are not finite.
    """
    backbone = backbone_of(model)
    blocks = decoder_layers(backbone)
    device = next(backbone.parameters()).device
    sums_L, positions = torch.zeros(len(blocks), dtype=torch.float64, device=device), 0
    mask_BS = torch.zeros(0, 0)

    def hook_for(index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            before_BSd = args[0] if args else kwargs["hidden_states"]
            after_BSd = output[0] if isinstance(output, tuple) else output
            if before_BSd.shape[:-1] != mask_BS.shape or before_BSd.shape != after_BSd.shape:
                raise ValueError(
                    f"The blocks of {type(model).__name__} do not pass on one state for each position, so their influence "
                    "cannot be measured. Choose the blocks by hand with --layers."
                )
            cosine_BS = torch.cosine_similarity(before_BSd.float(), after_BSd.float(), dim=-1)
            sums_L[index] += cosine_BS.double()[mask_BS].sum()

        return hook

    was_training = model.training
    model.eval()
    try:
        for reading in readings:
            mask_BS = reading.mask_BS.to(device).bool()
            positions += int(mask_BS.sum())
            with _hooked(blocks, hook_for):  # not longer: the model may write its answers between two readings
                backbone(input_ids=reading.ids_BS.to(device), attention_mask=mask_BS.long(), use_cache=False)
    finally:
        model.train(was_training)
    if not positions:
        raise ValueError("There is no position to measure influence at. Give prompts.")
    if not bool(torch.isfinite(sums_L).all()):
        first = int((~torch.isfinite(sums_L)).nonzero()[0]) + 1
        raise ValueError(
            f"The states around block {first} are not finite, so influence cannot be measured. Load another checkpoint, or a "
            "wider dtype."
        )
    return Influence(tuple((1 - sums_L / positions).tolist()), positions)


@contextmanager
def _hooked(blocks: nn.ModuleList, hook_for: Callable[[int], Callable]) -> Iterator[None]:
    handles = [block.register_forward_hook(hook_for(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choose_blocks(influence_L: Sequence[float], keep: int) -> list[int]:
    """The blocks to keep, 1-based and ascending: those of lowest influence go, of equal ones the higher.

    The first and the last block stay: the one makes states of embeddings, the other what the LM head reads.

    Raises:
        ValueError: fewer than two blocks to keep, or not fewer than there are.
    """
    depth = len(influence_L)
    if not 2 <= keep < depth:
        raise ValueError(
            f"{keep} of {depth} layers cannot be kept by influence: the first and the last stay and at least one goes, so 2 to "
            f"{depth - 1} can." + (" Or name them with --layers." if keep < depth else "")
        )
    inner = sorted(range(2, depth), key=lambda layer: (influence_L[layer - 1], -layer))
    return sorted({1, depth, *inner[depth - keep :]})
