"""The training objective of one micro-batch: ``output * L_OPD + representation * L_OPRD + logit * L_logit`` (Eq. 7).

One backbone forward of each model on one rollout; no trainer, no config object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from oprd.bridge import Bridge
from oprd.models import Head, head_of
from oprd.objectives import (
    cosine_similarity,
    full_vocab_kl,
    head_grams,
    logit_mse,
    representation_distance,
    sampled_token,
    top_k_kl,
)
from oprd.objectives.chunked import Log, PerPosition, chunked_output_terms, entropy, top_k_overlap
from oprd.objectives.prefix_marginal import PrefixTable, chain_log_mass, prefix_kl, prefix_sampled
from oprd.states import Rollout, visit_states

Terms = dict[str, Tensor]  # unweighted loss terms; they add up over micro-batches and processes
Sums = dict[str, tuple[Tensor, Tensor]]  # name -> (sum over positions, positions)


@dataclass(frozen=True)
class Objective:
    """What is minimised. ``layers`` are 1-based student layers; the teacher's are the same or, with a ``bridge``, those of
    its layer map. ``teacher_vocab_size`` is there where the tokenizers differ."""

    layers: tuple[int, ...]
    num_layers: int
    vocab_size: int
    representation_weight: float = 1.0
    representation_loss: str = "mse"
    logit_weight: float = 0.0
    output_loss: str = "none"
    output_weight: float = 1.0
    output_top_k: int = 16
    top_k_support: str = "student"
    top_k_renormalize: bool = True
    temperature: float = 1.0
    chunk_size: int = 1024
    teacher_vocab_size: int | None = None
    bridge: Bridge | None = field(default=None, repr=False)

    @property
    def uses_output(self) -> bool:
        return self.output_loss != "none" and self.output_weight != 0

    @property
    def uses_head(self) -> bool:
        """Whether some term sends gradient through the LM head's input (and to the head, if that is trained)."""
        return self.uses_output or self.logit_weight != 0

    @property
    def top_layer(self) -> int:
        """The highest block that any term reaches."""
        return self.num_layers if self.uses_head else max(self.layers)

    def per_position_output(self, table: PrefixTable | None) -> PerPosition:
        """Student logits, teacher logits ``[n, V]``, tokens ``[n]`` (and across tokenizers what `PrefixRows` holds for
        them) -> cost ``[n]`` and what to log."""
        if table is not None:
            return partial(self._across_tokenizers, table)
        costs = {
            "sampled": sampled_token,
            "top_k": lambda s, t, _: top_k_kl(s, t, self.output_top_k, self.top_k_support, self.top_k_renormalize),
            "full": lambda s, t, _: full_vocab_kl(s, t),
        }

        def one_vocabulary(student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Log]:
            cost = costs[self.output_loss](student, teacher, tokens)
            return cost, {"entropy/teacher": entropy(teacher), "overlap/top16": top_k_overlap(student, teacher)}

        return one_vocabulary

    def _across_tokenizers(self, table: PrefixTable, student: Tensor, teacher: Tensor, *rows: Tensor):
        if self.output_loss == "sampled":
            terms = prefix_sampled(student, teacher, *rows, table)
        else:
            terms = prefix_kl(
                student, teacher, *rows, table, self.output_top_k if self.output_loss == "top_k" else None
            )
        return terms.cost, {
            "prefix/supervised": terms.supervised,
            "prefix/student_rest": terms.student_rest,
            "prefix/teacher_rest": terms.teacher_rest,
        }

    def at_temperature(self, head: Head) -> Callable[[Tensor], Tensor]:
        """``[n, d] -> [n, V]``: float32 logits of the distribution that responses are sampled from."""
        return lambda states_nd: head.logits(states_nd).float() / self.temperature


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's states at the pairs, and nothing else: per student layer ``[N, d]`` (``[N, r]`` through a bridge), the
    last layer for the head, and the last layer along sampled tokens that take several teacher tokens."""

    layers: dict[int, Tensor]
    at_states: Tensor | None
    at_outputs: Tensor | None
    at_chains: Tensor | None = None


@torch.no_grad()
def teacher_states(objective: Objective, teacher: nn.Module, rollout: Rollout) -> TeacherStates:
    """One backbone forward of the teacher; keeps the supervised positions of the chosen layers."""
    layers = objective.layers if objective.representation_weight else ()
    bridge = objective.bridge
    readers: dict[int, list[int]] = {}  # teacher layer -> the student layers that are compared with it
    for layer in layers:
        readers.setdefault(bridge.layer_map[layer - 1] if bridge else layer, []).append(layer)
    kept: dict[int, Tensor] = {}

    def visit(teacher_layer: int, states_BSd: Tensor) -> None:
        states_Nd = rollout.state_pairs.of_teacher(states_BSd)
        for layer in readers[teacher_layer]:
            kept[layer] = bridge.project_teacher(layer, states_Nd) if bridge else states_Nd

    last_BSd, _ = visit_states(teacher, rollout.teacher, sorted(readers), visit)
    prefix = rollout.prefix if objective.uses_output else None
    return TeacherStates(
        kept,
        rollout.state_pairs.of_teacher(last_BSd) if objective.logit_weight else None,
        rollout.output_pairs.of_teacher(last_BSd) if objective.uses_output else None,
        None if prefix is None else last_BSd[prefix.chain_row_E, prefix.chain_column_E],
    )


def student_loss(
    objective: Objective, student: nn.Module, teacher: nn.Module, rollout: Rollout, targets: TeacherStates
) -> tuple[Tensor, Terms, Sums]:
    """One backbone forward of the student; the loss terms are built inside it, layer by layer.

    Returns:
        The weighted objective, already divided by the denominators that the rollout's weights hold; its terms; and the
        sums behind the logged averages. ``teacher`` only lends its head.
    """
    device = rollout.student.ids_BS.device
    exact = partial(torch.autocast, device_type=device.type, enabled=False)  # losses in float32 whatever the forward
    terms: Terms = {}
    sums: Sums = {}
    num_pairs = torch.tensor(float(len(rollout.state_pairs)), device=device)
    bridge = objective.bridge

    def visit(layer: int, states_BSd: Tensor) -> Tensor:
        with exact():
            own_Nd, target_Nd = rollout.state_pairs.of_student(states_BSd), targets.layers[layer]
            if bridge:
                own_Nd = bridge.project_student(layer, own_Nd)
            sums[f"cosine/layer_{layer:02d}"] = (cosine_similarity(own_Nd, target_Nd).sum(), num_pairs)
            distance_N = representation_distance(own_Nd, target_Nd, objective.representation_loss)
            return (rollout.state_weights_N * distance_N).sum()

    layers = objective.layers if objective.representation_weight else ()
    last_BSd, per_layer = visit_states(student, rollout.student, layers, visit)
    total = last_BSd.new_zeros((), dtype=torch.float32)

    if per_layer:
        term = torch.stack(list(per_layer.values())).mean()
        total = total + objective.representation_weight * term
        terms["representation"] = term.detach()
        cosines = [sums[f"cosine/layer_{layer:02d}"][0] for layer in per_layer]
        sums["cosine"] = (torch.stack(cosines).mean(), num_pairs)
    if objective.uses_head:
        own = head_of(student, objective.vocab_size)
        other = head_of(teacher, objective.teacher_vocab_size or objective.vocab_size)
        if objective.logit_weight:
            with exact():
                term = _logit_term(own, other, rollout, last_BSd, targets.at_states)
            total = total + objective.logit_weight * term
            terms["logit"] = term.detach()
        if objective.uses_output:
            term, output_sums = _output_term(objective, own, other, rollout, last_BSd, targets)
            total = total + objective.output_weight * term
            terms["output"] = term.detach()
            sums = output_sums | sums
    return total, terms, sums


def _logit_term(own: Head, other: Head, rollout: Rollout, last_BSd: Tensor, target_Nd: Tensor) -> Tensor:
    grams = head_grams(own.linear_form(), other.linear_form())
    states = own.linear_states(rollout.state_pairs.of_student(last_BSd))
    return (rollout.state_weights_N * logit_mse(states, other.linear_states(target_Nd), grams)).sum()


def _output_term(
    objective: Objective, own: Head, other: Head, rollout: Rollout, last_BSd: Tensor, targets: TeacherStates
) -> tuple[Tensor, Sums]:
    own_Nd, prefix = rollout.output_pairs.of_student(last_BSd), rollout.prefix
    rows = [rollout.output_tokens_N]
    if prefix is not None:
        rows += [prefix.residue_N, _chains(objective, other, rollout, targets.at_chains)]
    output = chunked_output_terms(
        objective.per_position_output(None if prefix is None else prefix.table),
        own_Nd,
        targets.at_outputs,
        rows,
        rollout.output_weights_N,
        objective.at_temperature(own),
        objective.at_temperature(other),
        objective.chunk_size,
    )
    count = torch.tensor(float(len(own_Nd)), device=own_Nd.device)
    sums: Sums = {name: (total, count) for name, total in output.sums.items()}
    if prefix is None and objective.bridge is None and own_Nd.shape[1] == targets.at_outputs.shape[1]:
        cosine_N = cosine_similarity(own_Nd, targets.at_outputs)  # for runs that do not compare the last states
        sums[f"cosine/layer_{objective.num_layers:02d}"] = (cosine_N.sum(), count)
    return output.loss, sums


@torch.no_grad()
def _chains(objective: Objective, other: Head, rollout: Rollout, at_chains_Ed: Tensor) -> Tensor:
    """Log probability of sampled tokens that take several teacher tokens, ``[N]``; NaN where one is enough."""
    prefix, project = rollout.prefix, objective.at_temperature(other)
    chain_N = at_chains_Ed.new_zeros(len(rollout.output_pairs), dtype=torch.float64)
    counts_N = torch.zeros_like(chain_N)
    for start in range(0, len(at_chains_Ed), objective.chunk_size):
        part = slice(start, start + objective.chunk_size)
        ranges = prefix.chain_low_E[part], prefix.chain_high_E[part]
        log_mass = chain_log_mass(project(at_chains_Ed[part]), *ranges, prefix.table.order_V)
        chain_N.index_add_(0, prefix.chain_pair_E[part], log_mass)
        counts_N.index_add_(0, prefix.chain_pair_E[part], torch.ones_like(log_mass))
    return torch.where(counts_N > 0, chain_N, torch.nan)
