"""What two models choose at the same places, under their own LM heads and under each other's.

Shapes: M positions, m of a chunk, V vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oprd.models import Head
from oprd.objectives.measures import entropy, top_k_overlap
from oprd.objectives.projection import rows_that_fit

Agree = Callable[[Tensor, Tensor], Tensor]
SWAPPED = {"teacher_under_student_head": (True, False), "student_under_teacher_head": (False, True)}


class ChoiceSums:
    """Sums over positions; `result` divides.

    Args:
        own, other: the heads, over the tokens of their tokenizers.
        one_vocabulary: a token is the same on both sides, so distributions can be compared.
        one_width: either head can read the other's states.
        agree: student's and teacher's token ids ``[m]`` -> bool ``[m]``.
    """

    def __init__(self, own: Head, other: Head, *, one_vocabulary: bool, one_width: bool, agree: Agree) -> None:
        self.own, self.other, self.agree = own, other, agree
        self.compares, self.swaps = one_vocabulary, one_vocabulary and one_width
        self.sums: dict[str, float] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, own_Md: Tensor, other_Md: Tensor) -> Tensor | None:
        """Add last hidden states at paired positions. Returns the reverse KL in nats, ``[M]``, within one vocabulary."""
        widest = max(len(self.own.weight_Vd), len(self.other.weight_Vd))
        at = torch.arange(len(own_Md), device=own_Md.device)
        found = [
            self._chunk(own_Md[at_m], other_Md[at_m]) for at_m in at.split(rows_that_fit(4 * widest, own_Md.device))
        ]
        self.count += len(own_Md)
        return torch.cat(found) if self.compares and found else None

    def _chunk(self, own_md: Tensor, other_md: Tensor) -> Tensor | None:
        own_mV, other_mV = self.own.logits(own_md).float(), self.other.logits(other_md).float()
        chosen_m = other_mV.argmax(-1)
        self._add("entropy_student", entropy(own_mV))
        self._add("entropy_teacher", entropy(other_mV))
        self._add("agreement", self.agree(own_mV.argmax(-1), chosen_m))
        if not self.compares:
            return None
        self._add("top16_overlap", top_k_overlap(own_mV, other_mV))
        kl_m = reverse_kl(own_mV, other_mV)
        self._add("kl", kl_m)
        for name, (own_head, own_states) in SWAPPED.items() if self.swaps else ():
            head, states_md = (self.own if own_head else self.other), (own_md if own_states else other_md)
            swapped_mV = head.logits(states_md).float()
            self._add(f"{name}/agreement", swapped_mV.argmax(-1) == chosen_m)
            self._add(f"{name}/kl", reverse_kl(swapped_mV, other_mV))
        return kl_m

    def _add(self, name: str, values_m: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + values_m.sum(dtype=torch.float64).item()

    def result(self) -> dict[str, float]:
        """Means: entropies and KL in nats, shares in [0, 1]."""
        return {name: total / max(self.count, 1) for name, total in self.sums.items()}


def reverse_kl(own_mV: Tensor, other_mV: Tensor) -> Tensor:
    """``sum_v p_S(v) log p_S(v) / p_T(v)`` in nats, ``[m]`` (Eq. 4)."""
    own, other = own_mV.log_softmax(-1), other_mV.log_softmax(-1)
    return (own.exp() * (own - other)).sum(-1)
