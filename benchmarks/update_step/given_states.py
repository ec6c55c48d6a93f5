"""Causal LMs that compute nothing below the head: their states are given. With them an update step is its loss alone.

Shapes: B sequences, S columns, L layers, d width.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from benchmarks.update_step.workload import Models, Shape
from torch import Tensor, nn
from transformers import Qwen2Config


class _Backbone(nn.Module):
    def __init__(self, config: Qwen2Config, states_LBSd: Tensor, trains: bool):
        super().__init__()
        self.config, self.trains = config, trains
        self.layers = nn.ModuleList(nn.Identity() for _ in range(config.num_hidden_layers))
        self.register_buffer("states_LBSd", states_LBSd, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> SimpleNamespace:
        """Each layer's states as leaves: a loss's gradient stops there."""
        rows, columns = input_ids.shape
        for layer, states_BSd in zip(self.layers, self.states_LBSd.unbind(0), strict=True):
            last = layer(states_BSd[:rows, :columns].detach().requires_grad_(self.trains))
        return SimpleNamespace(last_hidden_state=last)


class GivenStates(nn.Module):
    """What losses ask of a causal LM: a backbone, blocks to hook, a head, a config."""

    def __init__(
        self, shape: Shape, batch: int, columns: int, seed: int, dtype: torch.dtype, device: str, trains: bool
    ):
        super().__init__()
        self.config = Qwen2Config(vocab_size=shape.vocab, hidden_size=shape.width, num_hidden_layers=shape.layers)
        torch.manual_seed(seed)
        options = {"dtype": dtype, "device": device}
        states = torch.randn(shape.layers, batch, columns, shape.width, **options)
        self.base_model = _Backbone(self.config, states, trains)
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False, **options).requires_grad_(trains)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.base_model(input_ids).last_hidden_state))


def given_states(shape: Shape, batch: int, columns: int, dtype: torch.dtype, device: str) -> Models:
    """A student and a teacher of random states, for micro-batches of at most ``[batch, columns]``."""
    return Models(*(GivenStates(shape, batch, columns, i, dtype, device, trains=i == 0) for i in (0, 1)))
