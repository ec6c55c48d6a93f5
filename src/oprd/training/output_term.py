"""The next-token loss of one micro-batch: which objective, by which path, and what is logged of it.

Shapes: N output pairs, E chain steps, V vocabulary, d width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oprd import _compat
from oprd.models import Head
from oprd.objectives import cosine_similarity
from oprd.objectives.fused import (
    Kernel,
    Log,
    OutputTerms,
    differentiated,
    full_kernel,
    fused_terms,
    selected_kernel,
)
from oprd.objectives.lean import is_worth_it, top_k_terms
from oprd.objectives.measures import measured
from oprd.objectives.output_space import sampled_cost, top_k_selection
from oprd.objectives.prefix_marginal import PrefixTable, chain_log_mass, prefix_kl, prefix_sampled
from oprd.objectives.projection import Projection, rows_that_fit
from oprd.objectives.range_mass import BLOCK
from oprd.states import Rollout

if TYPE_CHECKING:
    from oprd.training.lessons import Sums
    from oprd.training.objective import Objective, TeacherStates


def output_term(
    objective: Objective, own_head: Head, other_head: Head, rollout: Rollout, last_BSd: Tensor, targets: TeacherStates
) -> tuple[Tensor, Sums]:
    """The weighted sum of the output loss, and the sums behind what is logged.

    ``last_BSd`` are the student's last hidden states; ``targets`` holds the teacher's at the pairs. Heads are multiplied in
    autocast's dtype where it is on, else in their states'; everything after is float32.
    """
    own_Nd, other_Nd, prefix = rollout.output_pairs.of_student(last_BSd), targets.at_outputs, rollout.prefix
    own, other = _projection(objective, own_head, own_Nd), _projection(objective, other_head, other_Nd)
    rows, weights_N = [rollout.output_tokens_N], rollout.output_weights_N
    if prefix is None:
        output = _one_vocabulary(objective, own, other, own_Nd, other_Nd, *rows, weights_N)
    else:
        rows += [prefix.residue_N, _chains(other, rollout, targets.at_chains)]
        kernel = differentiated(partial(_across_tokenizers, objective, prefix.table))
        k = {"sampled": 1, "top_k": objective.output_top_k + 1, "full": own.size}[objective.output_loss]
        row_bytes = 8 * k * max(k, BLOCK)  # of pairs of support tokens, and of the ends of ranges
        output = fused_terms(kernel, own, other, own_Nd, other_Nd, rows, weights_N, row_bytes)
    count = torch.tensor(float(len(own_Nd)), device=own_Nd.device)
    sums: Sums = {name: (total, count) for name, total in output.sums.items()}
    sums |= measured(own, None if prefix is not None else other, own_Nd, other_Nd)
    if prefix is None and objective.bridge is None and own_Nd.shape[1] == other_Nd.shape[1]:
        cosine_N = cosine_similarity(own_Nd, other_Nd)  # for runs that do not compare the last states
        sums[f"cosine/layer_{objective.num_layers:02d}"] = (cosine_N.sum(), count)
    return output.loss, sums


def _projection(objective: Objective, head: Head, states_Nd: Tensor) -> Projection:
    """The head at the temperature that responses are sampled at."""
    device = states_Nd.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_Nd.dtype
    return Projection(head.weight_Vd, head.bias_V, head.scale, head.softcap, objective.temperature, dtype)


def _one_vocabulary(
    objective: Objective,
    own: Projection,
    other: Projection,
    own_Nd: Tensor,
    other_Nd: Tensor,
    tokens_N: Tensor,
    weights_N: Tensor,
) -> OutputTerms:
    """The quickest path of each objective between two models of one vocabulary."""
    loss, k, support = objective.output_loss, objective.output_top_k, objective.top_k_support
    if loss == "top_k" and objective.top_k_renormalize and is_worth_it(k, own.size):
        return top_k_terms(own, other, own_Nd, other_Nd, weights_N, k, support)
    if loss != "top_k" and own.exact == torch.float32 and _compat.has_tiled_kernels(own_Nd.device):
        return _tiled(loss, own, other, own_Nd, other_Nd, tokens_N, weights_N)
    kernels: dict[str, Kernel] = {
        "sampled": selected_kernel(lambda p, q, y: (y.unsqueeze(1), lambda a, b: sampled_cost(a, b).squeeze(1))),
        "top_k": selected_kernel(lambda p, q, _: top_k_selection(p, q, k, support, objective.top_k_renormalize)),
        "full": full_kernel,
    }
    return fused_terms(kernels[loss], own, other, own_Nd, other_Nd, [tokens_N], weights_N)


def _tiled(
    loss: str,
    own: Projection,
    other: Projection,
    own_Nd: Tensor,
    other_Nd: Tensor,
    tokens_N: Tensor,
    weights_N: Tensor,
) -> OutputTerms:
    """``full`` and ``sampled`` by TRL's kernels: head products are repeated in the backward, but each tile is read once where
    torch takes ten passes. Without Triton they are slower than `fused_terms`."""
    if loss == "full":
        cost_N = _compat.tiled_reverse_kl(own, other, own_Nd, other_Nd)
    else:
        log_p_N = _compat.tiled_log_probability(own, own_Nd, tokens_N)
        with torch.no_grad():
            log_q_N = _compat.tiled_log_probability(other, other_Nd, tokens_N)
        cost_N = sampled_cost(log_p_N, log_q_N)
    return OutputTerms((weights_N * cost_N).sum(), {"output_divergence": cost_N.detach().sum()})


def _across_tokenizers(
    objective: Objective, table: PrefixTable, student_nV: Tensor, teacher_nV: Tensor, *rows: Tensor
) -> tuple[Tensor, Log]:
    if objective.output_loss == "sampled":
        terms = prefix_sampled(student_nV, teacher_nV, *rows, table)
    else:
        k = objective.output_top_k if objective.output_loss == "top_k" else None
        terms = prefix_kl(student_nV, teacher_nV, *rows, table, k)
    return terms.cost, {
        "prefix/supervised": terms.supervised,
        "prefix/student_rest": terms.student_rest,
        "prefix/teacher_rest": terms.teacher_rest,
    }


@torch.no_grad()
def _chains(other: Projection, rollout: Rollout, at_chains_Ed: Tensor) -> Tensor:
    """Log probability of sampled tokens that take several teacher tokens, ``[N]``; NaN where one is enough."""
    prefix = rollout.prefix
    chain_N = at_chains_Ed.new_zeros(len(rollout.output_pairs), dtype=torch.float64)
    counts_N = torch.zeros_like(chain_N)
    length = rows_that_fit(other.size * other.exact.itemsize, at_chains_Ed.device)
    for start in range(0, len(at_chains_Ed), length):
        part = slice(start, start + length)
        ranges = prefix.chain_low_E[part], prefix.chain_high_E[part]
        log_mass = chain_log_mass(other.logits(at_chains_Ed[part]), *ranges, prefix.table.order_V)
        chain_N.index_add_(0, prefix.chain_pair_E[part], log_mass)
        counts_N.index_add_(0, prefix.chain_pair_E[part], torch.ones_like(log_mass))
    return torch.where(counts_N > 0, chain_N, torch.nan)
