"""Which layers and which positions are compared. Layers count from 1; layer L is what the LM head reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYER_SPECS = ("all", "last", "even", "odd")
POSITION_SPECS = ("all", "last", "first_k", "last_k", "random_k")


def select_layers(spec: str | int | Sequence[int], num_layers: int) -> list[int]:
    """The layers that ``spec`` names in a model of ``num_layers`` blocks: 1-based, ascending, each once.

    ``spec`` is ``all``, ``last``, ``even``, ``odd`` (counting from 1), one number or a list of numbers; negative numbers
    count from the end.

    Raises:
        ValueError: unknown name, a layer outside ``1..num_layers``, or nothing selected.
    """
    if isinstance(spec, str):
        if spec not in LAYER_SPECS:
            raise ValueError(f"layers must be one of {', '.join(LAYER_SPECS)} or a list of numbers, got {spec!r}.")
        every = range(1, num_layers + 1)
        chosen = {
            "all": list(every),
            "last": [num_layers],
            "even": [layer for layer in every if layer % 2 == 0],
            "odd": [layer for layer in every if layer % 2 == 1],
        }[spec]
    else:
        given = [spec] if isinstance(spec, int) else list(spec)
        outside = [layer for layer in given if not 1 <= (layer if layer > 0 else layer + num_layers + 1) <= num_layers]
        if outside or 0 in given:
            raise ValueError(f"layers {outside or [0]} are outside 1..{num_layers}: the first block is 1.")
        chosen = sorted({layer if layer > 0 else layer + num_layers + 1 for layer in given})
    if not chosen:
        raise ValueError(f"layers={spec!r} selects nothing in a model of {num_layers} layers.")
    return chosen


def select_positions(
    mask: Tensor, spec: str, k: int | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Keep the positions that ``spec`` names among those already in ``mask``: bool ``[B, T]`` -> bool ``[B, T]``.

    ``all``, ``last`` (the last one), ``first_k``, ``last_k`` or ``random_k`` (k of each row, any of them equally likely;
    another draw with every call). Counts masked-in positions, not columns, so padding side and holes (tool results) do
    not matter. A row with fewer than ``k`` keeps all of its own.

    Args:
        generator: what ``random_k`` draws from, on any device; torch's own on the mask's by default.

    Raises:
        ValueError: unknown ``spec``; ``first_k``, ``last_k`` or ``random_k`` without a positive ``k``; a ``generator`` for
            what is not random.
    """
    if spec not in POSITION_SPECS:
        raise ValueError(f"positions must be one of {', '.join(POSITION_SPECS)}, got {spec!r}.")
    if spec in ("first_k", "last_k", "random_k") and (k is None or k < 1):
        raise ValueError(f"positions={spec!r} needs a positive position_k, got {k!r}.")
    if generator is not None and spec != "random_k":
        raise ValueError(f"positions={spec!r} draws nothing: leave the generator out.")
    mask = mask.bool()
    if spec == "all":
        return mask
    if spec == "random_k":
        device = mask.device if generator is None else generator.device
        draw = torch.rand(mask.shape, generator=generator, device=device).to(mask.device).masked_fill(~mask, -1)
        rank = draw.argsort(dim=1, descending=True).argsort(
            dim=1
        )  # 0 for a row's largest; what is masked out comes last
        return mask & (rank < k)
    ordinal = mask.cumsum(dim=1)  # 1 for a row's first masked-in position
    if spec == "first_k":
        return mask & (ordinal <= k)
    from_end = ordinal[:, -1:] - ordinal + 1 if mask.shape[1] else ordinal
    return mask & (from_end <= (1 if spec == "last" else k))


def map_layers(num_student: int, num_teacher: int) -> list[int]:
    """The teacher's layer for each student layer (Eq. 11): entry i is ``phi(i + 1)``, 1-based.

    ``phi(l) = round((l - 1) / (L_S - 1) * (L_T - 1)) + 1``, halves rounded up: first to first, last to last. A one-layer
    student maps to the teacher's last layer.
    """
    if num_student < 1 or num_teacher < 1:
        raise ValueError(f"Both models need at least one layer, got {num_student} and {num_teacher}.")
    if num_student == 1:
        return [num_teacher]
    span = num_student - 1
    return [(2 * index * (num_teacher - 1) + span) // (2 * span) + 1 for index in range(num_student)]
