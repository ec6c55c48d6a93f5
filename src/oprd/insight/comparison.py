"""One student beside one teacher: a forward of each for every reading, and all sums that a diagnosis is made of.

Shapes: B sequences, S columns, N pairs, M a sample of them, L layers, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oprd import models
from oprd.bridge import BridgeFitter
from oprd.bridge.collect import control_layers
from oprd.bridge.predict import predict
from oprd.insight.cases import Fit
from oprd.insight.choices import ChoiceSums
from oprd.insight.diagnostics import ActivationSums, ByPosition, KernelAlignment, StateSums
from oprd.objectives.measures import evenly_spaced
from oprd.states import Reading, Rollout, visit_states

SAMPLED = 256  # positions of a reading at which kernels and vocabularies are looked at
ENOUGH_ROWS = 4  # times the student's width: below, a linear map is fitted to too few positions to be judged


@dataclass(frozen=True)
class Seen:
    """One reading: the rollout and, of each of its pairs, how many positions of its answer are before and after it, and whether
    it is kept from the fit of a linear map; and how many tokens the student wrote."""

    rollout: Rollout
    before_N: Tensor
    after_N: Tensor
    held_out_N: Tensor
    tokens: int


def by_chance(count: int, generator: torch.Generator) -> Tensor:
    """A permutation in one random cycle, so that of several rows none is paired with its own partner."""
    order_N = torch.randperm(count, generator=generator)
    return torch.empty_like(order_N).scatter_(0, order_N, order_N.roll(1))


class Comparison:
    """Streams readings; `result` says what was found. Memory does not grow with their number.

    Args:
        student, teacher: on one device, in one dtype.
        fit: what their files have settled.
        seed: of the pairs by chance.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, fit: Fit, *, seed: int = 0) -> None:
        self.student, self.teacher, self.fit = student, teacher, fit
        device = next(student.parameters()).device
        depths, (own, other) = fit.facts["layers"], fit.facts["width"]
        self.states = [StateSums(own, device) for _ in fit.layer_map] if fit.one_width else []
        self.kernels = KernelAlignment(*depths)
        self.activations = {
            role: [ActivationSums(width, device) for _ in range(depth)]
            for role, width, depth in zip(("student", "teacher"), (own, other), depths, strict=True)
        }
        self.few = control_layers(depths[0])
        few_map = [fit.layer_map[layer - 1] for layer in self.few]
        self.fitter = BridgeFitter(few_map, own, other, device=device)
        self.chance = BridgeFitter(few_map[-1:], own, other, device=device)  # one layer: moments are large
        heads = [models.head_of(model, size) for model, size in zip((student, teacher), fit.vocab_sizes, strict=True)]
        self.heads = heads
        self.choices = ChoiceSums(*heads, one_vocabulary=fit.one_vocabulary, one_width=fit.one_width, agree=fit.agree)
        self.cosine_by_position = ByPosition(len(self.states))
        self.kl_by_position = ByPosition(1)
        self.generator = torch.Generator().manual_seed(seed)
        self.paired = self.written = 0

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        """One reading of both."""
        rollout, before_N, after_N, held_out_N = seen.rollout, seen.before_N, seen.after_N, seen.held_out_N
        pairs = rollout.state_pairs
        self.written += seen.tokens
        own = self._read("student", self.student, rollout.student, pairs.of_student)
        other = self._read("teacher", self.teacher, rollout.teacher, pairs.of_teacher)
        self.paired += len(pairs)
        if not len(pairs):
            return
        partners = [other[layer] for layer in self.fit.layer_map]
        order_N = by_chance(len(pairs), self.generator).to(before_N.device)
        if self.states:
            rows = zip(self.states, own.values(), partners, strict=True)
            cosine_LN = torch.stack([sums.update(a, b, order_N) for sums, a, b in rows])
            self.cosine_by_position.update(cosine_LN, before_N, after_N)
        at_M = evenly_spaced(len(pairs), SAMPLED, before_N.device)
        mixed_M = order_N[at_M]
        self.kernels.update([a[mixed_M] for a in own.values()], [b[mixed_M] for b in other.values()])
        last = [states[max(states)][at_M] for states in (own, other)]
        kl_M = self.choices.update(*last)
        if kl_M is not None:
            self.kl_by_position.update(kl_M[None], before_N[at_M], after_N[at_M])
        for held_out in (False, True):
            rows_n = (held_out_N == held_out).nonzero().flatten()
            a, b = ([own[layer][rows_n] for layer in self.few], [partners[layer - 1][rows_n] for layer in self.few])
            self.fitter.update(a, b, held_out=held_out)
            mixed_n = by_chance(len(rows_n), self.generator).to(rows_n.device)
            self.chance.update(a[-1:], [b[-1][mixed_n]], held_out=held_out)

    def _read(self, role: str, model: nn.Module, reading: Reading, gather: Any) -> dict[int, Tensor]:
        """States at the pairs of every layer; sizes are taken on the way, at all positions.

        Raises:
            ValueError: NaN or infinity, named by its layer.
        """
        depth = len(self.activations[role])
        mask_BS = reading.mask_BS.bool()

        def visit(layer: int, states_BSd: Tensor) -> Tensor:
            rows_Nd = states_BSd[mask_BS]
            if not bool(torch.isfinite(rows_Nd).all()):
                held = str(rows_Nd.dtype).removeprefix("torch.")
                raise ValueError(
                    f"The states of the {role}'s layer {layer} hold NaN or infinity in {held}. Give --dtype float32, or mend the model."
                )
            self.activations[role][layer - 1].update(rows_Nd)
            return gather(states_BSd)

        return visit_states(model, reading, range(1, depth + 1), visit)[1]

    def result(self) -> dict[str, Any]:
        """JSON values.

        Raises:
            ValueError: no pair was seen, or too few of any one reading to compare kernels.
        """
        if not self.paired:
            raise ValueError(
                "No position of the student's answers ends where a teacher token ends, so there is nothing to compare."
            )
        matrix = self.kernels.matrix()
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(
                f"{self.paired} positions in {self.written} tokens are too few to compare states at, or some states never change. "
                "Give more --prompts, or longer answers (--max_new_tokens)."
            )
        layers = []
        for layer, partner in enumerate(self.fit.layer_map, 1):
            row = {"layer": layer, "teacher_layer": partner, "cka": float(matrix[layer - 1, partner - 1])}
            layers.append(row | (self.states[layer - 1].result() if self.states else {}))
        return {
            "layers": layers,
            "cka": matrix.tolist(),
            "positions": self._positions(),
            "activations": {role: [one.result() for one in sums] for role, sums in self.activations.items()},
            "choices": self.choices.result(),
            "bridge": self._bridge(),
            "paired_share": self.paired / self.written,
        }

    def _positions(self) -> list[dict[str, float]]:
        """Cosine (mean over layers, and of the last) and KL over the first and the last k positions."""
        rows: dict[int, dict[str, float]] = {}
        for entry in self.cosine_by_position.curves() if self.states else []:
            row = rows.setdefault(entry["k"], {"k": entry["k"]})
            for side in ("first", "last"):
                row[f"cosine_{side}"] = sum(entry[side]) / len(entry[side])
                row[f"last_layer_cosine_{side}"] = entry[side][-1]
        for entry in self.kl_by_position.curves():
            row = rows.setdefault(entry["k"], {"k": entry["k"]})
            row |= {f"kl_{side}": entry[side][0] for side in ("first", "last")}
        return [rows[k] for k in sorted(rows)]

    def _bridge(self) -> dict[str, Any] | None:
        """What a linear map from the student's states tells of the teacher's, on answers that it was not fitted to."""
        if not self.fitter.count or self.fitter.held_out is None:
            return None
        report, chance = self.fitter.fit("auto").report, self.chance.fit("auto").report
        own, other = self.heads
        return {
            "layers": self.few,
            "rows": self.fitter.count,
            "enough_rows": self.fitter.count >= ENOUGH_ROWS * self.fitter.dims[0],
            "explained": report["explained"]["held_out"][-1],
            "explained_by_chance": chance["explained"]["held_out"][-1],
            "rank": report["rank"]["theorem"],
            "rank_of_highest_cosine": report["rank"].get("held_out_cosine"),
            "prediction": predict(
                self.fitter,
                lambda h: own.logits(h.to(own.weight_Vd)).float().cpu(),
                lambda h: other.logits(h.to(other.weight_Vd)).float().cpu(),
                self.fit.agree,
            ),
        }
