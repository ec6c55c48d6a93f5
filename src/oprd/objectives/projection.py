"""A head as the output losses read it: exact logits of some positions and tokens, and gradients back through them.

Shapes: n positions, V vocabulary, v some of its tokens, K tokens of each position, d width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COPY_BYTES = 2**27  # 128 MiB: what one [n, V] copy, or one gathered [n, K, d], may take
CPU_COPY_BYTES = 2**24  # 16 MiB: beyond the caches and malloc's reuse, passes cost several times as much


def rows_that_fit(bytes_per_row: int, device: torch.device) -> int:
    """How many positions a chunk has, at least 1."""
    budget = CPU_COPY_BYTES if device.type == "cpu" else COPY_BYTES
    return max(1, budget // max(bytes_per_row, 1))


class Projection(NamedTuple):
    """``logits = softcap * tanh(scale * (W h + b) / softcap) / temperature``; no tanh where ``softcap`` is None.

    ``weight_Vd`` and ``bias_V`` may need gradients. ``dtype`` is what states and weights are multiplied in (autocast's, or
    the states'); logits are float32, or float64 if that is.
    """

    weight_Vd: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.weight_Vd.shape[0]

    @property
    def exact(self) -> torch.dtype:
        """What logits and gradients are kept in."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def factor(self) -> float:
        """Derivative of the logits by ``W h + b``, but for the soft cap's part."""
        return self.scale / self.temperature

    def cast(self) -> Projection:
        """Weights in the dtype they are multiplied in, without gradients."""
        bias = None if self.bias_V is None else self.bias_V.detach().to(self.exact)
        return self._replace(weight_Vd=self.weight_Vd.detach().to(self.dtype), bias_V=bias)

    def logits(self, states_nd: Tensor, tokens: slice = slice(None)) -> Tensor:
        """``[n, d] -> [n, v]``; no gradient."""
        with torch.no_grad(), torch.autocast(states_nd.device.type, enabled=False):
            weight_vd, states_nd = self.weight_Vd[tokens].to(self.dtype), states_nd.to(self.dtype)
            if states_nd.is_cuda and self.dtype != self.exact:  # products of bf16, not rounded to it
                logits_nv = torch.mm(states_nd, weight_vd.T, out_dtype=self.exact)
            else:
                logits_nv = (states_nd @ weight_vd.T).to(self.exact)
            if self.bias_V is not None:
                logits_nv += self.bias_V[tokens].to(self.exact)
            return self._shape_(logits_nv)

    def rows(self, tokens_nK: Tensor) -> Tensor:
        """The head's rows of a few tokens of each position, ``[n, K] -> [n, K, d]``."""
        return self.weight_Vd.detach()[tokens_nK].to(self.exact)

    def at_tokens(self, states_nd: Tensor, tokens_nK: Tensor, rows_nKd: Tensor) -> Tensor:
        """Logits of a few tokens of each position, ``[n, K]``, of `rows` without rounding; no gradient."""
        logits_nK = torch.bmm(rows_nKd, states_nd.detach().to(self.exact).unsqueeze(2)).squeeze(2)
        if self.bias_V is not None:
            logits_nK += self.bias_V.detach()[tokens_nK].to(self.exact)
        return self._shape_(logits_nK)

    def _shape_(self, logits: Tensor) -> Tensor:
        if self.softcap is not None:
            logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.factor != 1.0:
            logits.mul_(self.factor)
        return logits

    def uncap_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Multiply a gradient by the logits by the derivative of the soft cap, in place."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits * (self.temperature / self.softcap)).square_())
        return gradient
