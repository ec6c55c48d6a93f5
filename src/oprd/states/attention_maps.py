"""Queries and keys of chosen layers, shown to a visitor inside the forward that attends with them.

Registered with transformers under `OBSERVED`: the attention of `attention`, padded or packed, with an observer that travels
as an argument of the forward. Without that argument it is transformers' own ``sdpa``, so generation goes on as before.

What the visitor returns is kept, so a loss term built there hangs behind its layer's queries and keys. Gradient checkpointing
runs a block again in backward, with the same arguments; the visitor is then called again, because the recomputation has to
save for backward what the first run saved, and what it returns is dropped.

Shapes: P places (``B * S``, row by row), H query heads, G key heads, h head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from oprd.models import backbone_of, causal_lm, text_config
from oprd.states.attention import OBSERVED, PACKED, as_autocast, other_attention, packed_attention_forward

T = TypeVar("T")
OBSERVER = "oprd_observer"
REMEDY = "Leave attention maps out of the objective for this model."
# layer, query [P, H, h], key [P, G, h] (after norms and rotary embedding), scaling of their product, sliding window
Visit = Callable[[int, Tensor, Tensor, float, int | None], T]


class AttentionObserver(Generic[T]):
    """For one forward: what ``visit`` made of the queries and keys of each of ``layers`` (1-based) is in ``results``.

    ``visit`` is to do the same whenever it is called, and to return what it has to say rather than to add it up somewhere.
    Not a dataclass: FSDP2 copies those.
    """

    def __init__(self, layers: Collection[int], visit: Visit[T]) -> None:
        self.layers, self.visit = frozenset(layers), visit
        self.results: dict[int, T] = {}
        self._with_graph = self._began = self._is_over = False

    @contextmanager
    def during_forward_of(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """Arguments for the one forward that is observed.

        Raises:
            ValueError: a layer did not show its attention, or did so in a way that cannot be used.
        """
        assert not self._began, "an observer is for one forward: backward may still come back to the first"
        self._began, self._with_graph = True, torch.is_grad_enabled()
        yield {OBSERVER: self}
        self._is_over = True
        missing = sorted(self.layers - self.results.keys())
        if missing:
            raise ValueError(
                f"{type(causal_lm(model)).__name__} did not show its attention in layers {missing}: "
                "oprd.states.use_observed_attention comes first, and the model has to hand the arguments of its forward "
                f"down. {REMEDY}"
            )

    def see(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float | None, window: int | None) -> None:
        """One layer's attention is about to run on query ``[B, H, S, h]`` and key ``[B, G, S, h]``."""
        layer = module.layer_idx + 1
        if layer not in self.layers:
            return
        if self._with_graph and not torch.is_grad_enabled():
            raise ValueError(
                "Attention maps need gradient checkpointing that keeps a graph in the forward. Set "
                "gradient_checkpointing_kwargs: {use_reentrant: false}."
            )
        if layer in self.results and not self._is_over:
            raise ValueError(f"{type(module).__name__} attends twice in a layer. {REMEDY}")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        places = (x.transpose(1, 2).flatten(0, 1) for x in (query, key))
        result = self.visit(layer, *places, scaling, window)
        if not self._is_over:
            self.results[layer] = result


def observed_attention_forward(
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
    """What transformers calls: `packed_attention_forward`, behind the observer's eyes if there is one.

    Raises:
        ValueError: the attention is more than a softmax of products of queries and keys.
    """
    observer: AttentionObserver | None = kwargs.pop(OBSERVER, None)
    if observer is not None:
        lacking = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if lacking:
            raise ValueError(f"{type(module).__name__} has {', '.join(lacking)} in its attention. {REMEDY}")
        query, key, value = as_autocast(query, key, value)  # so that what is kept for backward is what sdpa keeps
        observer.see(module, query, key, scaling, sliding_window)
    return packed_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
    )


AttentionInterface.register(OBSERVED, observed_attention_forward)
AttentionMaskInterface.register(OBSERVED, sdpa_mask)


def use_observed_attention(model: nn.Module) -> None:
    """From now on the model's attention can be observed, and it reads everything else as before (packed rows too, if it
    did).

    Raises:
        ValueError: its attention is not ``sdpa``, or not every layer is attention.
    """
    config, name = text_config(model), type(causal_lm(model)).__name__
    if config._attn_implementation == OBSERVED:
        return
    if config._attn_implementation not in ("sdpa", PACKED):
        raise ValueError(
            f"Attention maps need attn_implementation: sdpa, and {name} has {config._attn_implementation!r}. Set "
            "model_init_kwargs and teacher_model_init_kwargs: {attn_implementation: sdpa}. Or: " + REMEDY
        )
    if other := other_attention(model):
        raise ValueError(f"{name} has no attention maps to compare ({other}). {REMEDY}")
    config._attn_implementation = OBSERVED


@torch.no_grad()
def check_observed_attention(model: nn.Module) -> None:
    """Read a short text, and compare the softmax of the queries and keys seen with the model's own attention maps.

    Raises:
        ValueError: they differ, so a map holds more than queries and keys; or attention is not shown, or not given out.
    """
    backbone, config, name = backbone_of(model), text_config(model), type(causal_lm(model)).__name__
    parameter = next(backbone.parameters())
    ids = torch.arange(8, device=parameter.device).unsqueeze(0) % config.vocab_size

    def own_map(layer: int, query_PHh: Tensor, key_PGh: Tensor, scaling: float, window: int | None) -> Tensor:
        key_PHh = key_PGh.float().repeat_interleave(query_PHh.shape[1] // key_PGh.shape[1], dim=1)
        scores_HPP = torch.einsum("phd,shd->hps", query_PHh.float(), key_PHh) * scaling
        back_PP = torch.arange(8, device=ids.device).unsqueeze(1) - torch.arange(8, device=ids.device)
        hidden_PP = (back_PP < 0) | (back_PP >= (window or 8))
        return scores_HPP.masked_fill(hidden_PP, -torch.inf).softmax(-1)

    observer = AttentionObserver(range(1, config.num_hidden_layers + 1), own_map)
    was_training, implementation = backbone.training, config._attn_implementation
    backbone.eval()  # dropout would differ
    try:
        with observer.during_forward_of(model) as arguments, torch.autocast(ids.device.type, enabled=False):
            backbone(input_ids=ids, use_cache=False, **arguments)
        config._attn_implementation = "eager"
        with torch.autocast(ids.device.type, enabled=False):
            expected = backbone(input_ids=ids, use_cache=False, output_attentions=True).attentions
    finally:
        config._attn_implementation = implementation
        backbone.train(was_training)
    given = [] if expected is None else [maps for maps in expected if maps is not None]
    if len(given) != len(observer.results):
        raise ValueError(f"{name} gives out {len(given)} attention maps for {len(observer.results)} layers. {REMEDY}")
    seen = [observer.results[layer] for layer in sorted(observer.results)]
    errors = [(a - b[0].float()).abs().max() for a, b in zip(seen, given, strict=True)]
    rounds = parameter.dtype.itemsize < 4 or getattr(causal_lm(model), "is_quantized", False)
    error = max(float(e) for e in errors)
    if not error < (5e-2 if rounds else 1e-3):
        raise ValueError(f"{name} attends by more than queries and keys (maps differ by {error:.2g}). {REMEDY}")
