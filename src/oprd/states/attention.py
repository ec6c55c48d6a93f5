"""Attention over documents packed into one row, none of which sees another.

Registered with transformers under `PACKED`: any model whose attention goes through ``AttentionInterface`` can use it. What
is packed travels as an argument of the forward (`Packing`), which gradient checkpointing keeps for its recomputation.
Without that argument it is transformers' own ``sdpa``, so generation goes on as before.

Shapes: H query heads, G key heads, T packed tokens, h head size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from oprd.models import backbone_of, causal_lm, text_config

PACKED = "oprd_packed"
OBSERVED = "oprd_observed"  # the same, with an observer: see attention_maps
ARGUMENT = "oprd_packing"
KeysAndValues = tuple[list[Tensor], list[Tensor]]  # one [1, G, length, h] per document


class Packing:
    """Lengths of the documents in a packed row.

    ``writes``: a place for every layer's keys and values, for a later reading that goes on from here. ``reads``: those of
    the earlier reading; constants. Not a dataclass: FSDP2 copies those, and the writes would go nowhere.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        writes: dict[int, KeysAndValues] | None = None,
        reads: dict[int, KeysAndValues] | None = None,
    ) -> None:
        self.lengths, self.writes, self.reads = lengths, writes, reads


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls: query ``[1, H, T, h]``, key and value ``[1, G, T, h]`` -> ``[1, T, H, h]``.

    Raises:
        ValueError: the model does not hand the packing down, or asks for something that packed attention lacks.
    """
    packing: Packing | None = kwargs.pop(ARGUMENT, None)
    if packing is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(f"{type(module).__name__} gets no arguments from its model's forward. {REMEDY}")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    lacking = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if lacking:
        raise ValueError(f"{type(module).__name__} needs {', '.join(lacking)} in its attention. {REMEDY}")
    query, key, value = as_autocast(query, key, value)
    keys, values = (list(x.split(packing.lengths, dim=2)) for x in (key, value))
    if packing.writes is not None:
        if module.layer_idx in packing.writes:
            raise ValueError(
                f"{type(module).__name__} attends twice in a layer. Set gradient_scope: full for this model."
            )
        packing.writes[module.layer_idx] = (keys, values)
    if packing.reads is not None:
        earlier_keys, earlier_values = packing.reads[module.layer_idx]
        keys = [torch.cat(parts, dim=2) for parts in zip(earlier_keys, keys, strict=True)]
        values = [torch.cat(parts, dim=2) for parts in zip(earlier_values, values, strict=True)]
    if _has_varlen_kernel(query, value, dropout):
        return _varlen(query, keys, values, packing, scaling, sliding_window), None
    output = [
        _document(q, k, v, dropout, scaling, sliding_window).transpose(1, 2)
        for q, k, v in zip(query.split(packing.lengths, dim=2), keys, values, strict=True)
    ]
    return torch.cat(output, dim=1), None  # one copy, in the order of tokens


def as_autocast(*states: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype if that is on: it casts for sdpa only, and rotary embeddings leave queries and keys in float32."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    half = torch.get_autocast_dtype(device)
    return tuple(x.to(half) if x.dtype == torch.float32 else x for x in states)


REMEDY = "Unset max_tokens_per_microbatch and set gradient_scope: full for this model."


def _document(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention of a document's last tokens ``[1, H, q, h]`` to all of it ``[1, G, k, h]``, q <= k."""
    new, length = query.shape[2], key.shape[2]
    mask = None
    if new == 0:
        return query.new_empty(*query.shape[:3], value.shape[3])
    if new != length or (window is not None and length > window):
        row = torch.arange(length - new, length, device=query.device).unsqueeze(1)
        column = torch.arange(length, device=query.device)
        mask = column <= row
        if window is not None:
            mask = mask & (column > row - window)
    if query.is_cuda and (mask is not None or query.dtype == torch.float32):
        # CUDA's kernels take no grouped heads here and would fall back to whole matrices of scores.
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and new > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _has_varlen_kernel(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's FlashAttention for documents of several lengths takes these tensors."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or dropout != 0:
        return False
    if not torch.backends.cuda.is_flash_attention_available() or torch.cuda.get_device_capability(query.device) < (
        8,
        0,
    ):
        return False
    return query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0


@lru_cache(maxsize=64)
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents begin and the last one ends, int32 ``[documents + 1]``; kept, as making it waits for the device."""
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(device)


def _varlen(
    query: Tensor, keys: list[Tensor], values: list[Tensor], packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    """All documents in one kernel: ``[1, H, T, h]`` and lists of ``[1, G, k, h]`` -> ``[1, T, H, h]``."""
    from torch.nn.attention.varlen import varlen_attn

    totals = [k.shape[2] for k in keys]
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, torch.cat(keys, dim=2), torch.cat(values, dim=2)))
    ends = [_ends(tuple(sizes), q.device) for sizes in (packing.lengths, totals)]
    output = varlen_attn(
        q,
        k,
        v,
        *ends,
        max(packing.lengths),
        max(totals),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.unsqueeze(0)


AttentionInterface.register(PACKED, packed_attention_forward)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions is taken for one that is ready, so no model builds its own; this one is empty."""
    return torch.empty(0, 1, 1, 1, dtype=torch.bool, device=device)


def use_packed_attention(model: nn.Module) -> None:
    """From now on the model reads packed rows when it is given a `Packing`, and everything else as before.

    Raises:
        ValueError: its attention is not ``sdpa``, or not every layer is attention.
    """
    lm, config = causal_lm(model), text_config(model)
    name = type(lm).__name__
    if config._attn_implementation in (PACKED, OBSERVED):
        return
    if config._attn_implementation != "sdpa":
        raise ValueError(
            f"Packed rows need attn_implementation: sdpa, and {name} has {config._attn_implementation!r}. Set "
            "model_init_kwargs and teacher_model_init_kwargs: {attn_implementation: sdpa}. Or: " + REMEDY
        )
    if other := other_attention(model):
        raise ValueError(f"{name} cannot read packed rows ({other}). {REMEDY}")
    config._attn_implementation = PACKED


def other_attention(model: nn.Module) -> str:
    """What a model attends with that does not go through ``AttentionInterface``; nothing if all does."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(causal_lm(model), "_supports_attention_backend", False):
        return ", ".join(sorted(kinds))
    return "its own attention"


@torch.no_grad()
def check_packed_attention(model: nn.Module, *, suffix: bool = False) -> None:
    """Read two short documents packed and apart, and compare; with ``suffix`` also packed and in two parts.

    Raises:
        ValueError: the states differ, so packed documents see each other or the places of tokens are lost.
    """
    backbone = backbone_of(model)
    parameter = next(backbone.parameters())
    ids = torch.arange(8, device=parameter.device).unsqueeze(0) % text_config(model).vocab_size
    lengths = (3, 5)
    places = torch.cat([torch.arange(length, device=parameter.device) for length in lengths]).unsqueeze(0)

    def packed(columns: list[int], packing: Packing) -> Tensor:
        arguments = {"position_ids": places[:, columns], "attention_mask": no_mask(parameter.device), ARGUMENT: packing}
        return backbone(input_ids=ids[:, columns], use_cache=False, **arguments).last_hidden_state

    was_training = backbone.training
    backbone.eval()  # dropout would differ
    try:
        apart = [backbone(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(lengths, dim=1)]
        expected = torch.cat(apart, dim=1).float()
        errors = [packed(list(range(8)), Packing(lengths)).float() - expected]
        if suffix:
            late = [1, 2, 5, 6, 7]  # of documents 0..2 and 3..7
            memory: dict[int, KeysAndValues] = {}
            packed([0, 3, 4], Packing((1, 2), writes=memory))
            errors.append(packed(late, Packing((2, 3), reads=memory)).float() - expected[:, late])
    finally:
        backbone.train(was_training)
    error = torch.cat(errors, dim=1).abs().max() / expected.abs().max()
    rounds = torch.is_autocast_enabled(parameter.device.type) or parameter.dtype.itemsize < 4
    rounds = rounds or getattr(causal_lm(model), "is_quantized", False)
    if not error < (5e-2 if rounds else 1e-3):
        raise ValueError(f"{type(causal_lm(model)).__name__} reads packed rows differently ({error:.2g}). {REMEDY}")
