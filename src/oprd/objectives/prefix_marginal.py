"""Next-token objectives across tokenizers: the teacher's distribution over the student's tokens, summed over its own.

At every student position the teacher stands at its last boundary, ``u`` bytes behind (the residue). Student token s then has

    m(s) = sum of q(v) over teacher tokens v whose bytes start with u + s,  relative to those that start with u.

With the teacher's tokens sorted by bytes every such set is a range, so m is a difference of two prefix sums of the sorted
distribution. Shapes: n positions, V_T and V_S tokens, K support tokens, M table entries, U residues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6  # the least share of the teacher's mass a token is taken to have: log q stays finite
LEAST_RESIDUE_MASS = (
    1e-4  # below, the teacher holds what the student wrote for impossible and has no say on what follows
)


@dataclass(frozen=True)
class PrefixTable:
    """Where student tokens lie among the teacher's, after each residue of a batch.

    ``order_V`` teacher tokens in the order of their bytes, special ones behind. Entry m says: after residue
    ``keys_M // V_S``, student token ``keys_M % V_S`` is the range ``low_M .. high_M`` of that order. Keys rise. Pairs that
    are not listed are beyond what one teacher token can say. ``residue_low_U .. residue_high_U``: the tokens that start
    with a residue. ``rank_V``, ``last_V``: the student's own byte order; token t extends s if
    ``rank[s] < rank[t] <= last[s]``.
    """

    order_V: Tensor
    keys_M: Tensor
    low_M: Tensor
    high_M: Tensor
    residue_low_U: Tensor
    residue_high_U: Tensor
    rank_V: Tensor
    last_V: Tensor

    def lookup(self, residue_n: Tensor, tokens_nK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ranges ``low``, ``high`` ``[n, K]`` and whether there is one, bool."""
        wanted = residue_n.unsqueeze(1) * len(self.rank_V) + tokens_nK
        place = torch.searchsorted(self.keys_M, wanted).clamp(max=len(self.keys_M) - 1)
        found = self.keys_M[place] == wanted
        return self.low_M[place], self.high_M[place], found


class PrefixTerms(NamedTuple):
    """Per position ``[n]``: the cost; whether the teacher had a say; mass of either side on what was not told apart; and
    the teacher's mass on tokens that end inside the student's."""

    cost: Tensor
    supervised: Tensor
    student_rest: Tensor
    teacher_rest: Tensor


@torch.no_grad()
def sorted_mass(teacher_logits_nV: Tensor, order_V: Tensor) -> Tensor:
    """Prefix sums ``[n, V_T + 1]`` of the teacher's distribution in sorted order, float64: differences of nearly equal
    sums must keep small masses."""
    mass = teacher_logits_nV.float().softmax(-1)[:, order_V].double().cumsum(-1)
    return torch.nn.functional.pad(mass, (1, 0))


@torch.no_grad()
def range_mass(cumulative_nV: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mass of ranges: ``[n, V_T + 1]`` and bounds ``[n, K]`` -> float64 ``[n, K]``."""
    return (cumulative_nV.gather(1, high) - cumulative_nV.gather(1, low)).clamp(min=0)


@torch.no_grad()
def _residue_mass(cumulative_nV: Tensor, residue_n: Tensor, table: PrefixTable) -> Tensor:
    low, high = table.residue_low_U[residue_n], table.residue_high_U[residue_n]
    return range_mass(cumulative_nV, low.unsqueeze(1), high.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def _masses(
    cumulative_nV: Tensor, residue_n: Tensor, tokens_nK: Tensor, table: PrefixTable
) -> tuple[Tensor, Tensor, Tensor]:
    """m(s) ``[n, K]``, which of them one teacher token can say, and the residue's own mass ``[n]``."""
    residue = _residue_mass(cumulative_nV, residue_n, table)
    low, high, found = table.lookup(residue_n, tokens_nK)
    mass = range_mass(cumulative_nV, low, high) / residue.clamp(min=1e-30).unsqueeze(1)
    return torch.where(found, mass, 0.0), found, residue


def _ancestor(tokens_nK: Tensor, can_nK: Tensor, table: PrefixTable) -> Tensor:
    """For every support token, the column of the longest other one that is a prefix of it and can hold mass; else -1."""
    rank, last = table.rank_V[tokens_nK], table.last_V[tokens_nK]
    extends = (rank.unsqueeze(2) > rank.unsqueeze(1)) & (rank.unsqueeze(2) <= last.unsqueeze(1))  # [n, token, prefix]
    depth = torch.where(
        extends & can_nK.unsqueeze(1), rank.unsqueeze(1), -1
    )  # of nested prefixes the longest sorts last
    deepest, column = depth.max(dim=2)
    return torch.where(deepest >= 0, column, -1)


def prefix_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens_n: Tensor,
    residue_n: Tensor,
    chain_n: Tensor,
    table: PrefixTable,
    k: int | None,
) -> PrefixTerms:
    """Reverse KL from the student's next-token distribution to the teacher's, on events that both can tell apart.

    The support is the student's top ``k`` and the sampled token (``k=None``: the whole vocabulary). Each support token is
    an event of its own if one teacher token can say it, or if it is the sampled one, whose probability along the actual
    text is ``chain_n`` where it takes several. Tokens that are longer than the teacher's are counted with the longest
    support token that is a prefix of theirs, or with the rest; a shorter token's event leaves out the longer ones that
    have their own. Everything outside the support is one event, the rest, on both sides: the value is a lower bound of
    the full divergence, and exact where every student token has an event of its own.

    Args:
        student_logits, teacher_logits: ``[n, V_S]``, ``[n, V_T]``, the teacher's at its anchors.
        tokens_n, residue_n: sampled token; row of the table.
        chain_n: log probability of the sampled token where it takes several teacher tokens (not yet relative to the
            residue), NaN where one is enough.
    """
    log_p = student_logits.float().log_softmax(-1)
    size = log_p.shape[-1]
    if k is None or k >= size:
        support = torch.arange(size, device=log_p.device).expand(len(log_p), -1)
        counts = torch.ones_like(support, dtype=torch.bool)
    else:
        top = log_p.detach().topk(k, dim=-1).indices
        support = torch.cat([top, tokens_n.unsqueeze(1)], 1)
        counts = torch.ones_like(support, dtype=torch.bool)
        counts[:, -1] = (top != tokens_n.unsqueeze(1)).all(1)
    with torch.no_grad():
        cumulative = sorted_mass(teacher_logits, table.order_V)
        mass, own_event, residue = _masses(cumulative, residue_n, support, table)
        is_sampled = support == tokens_n.unsqueeze(1)
        chained = is_sampled & ~chain_n.isnan().unsqueeze(1)
        chain = (chain_n.double() - residue.clamp(min=1e-30).log()).exp().clamp(max=1.0).unsqueeze(1)
        mass = torch.where(chained, chain, mass)
        own_event = (own_event | is_sampled) & counts
        parent = _ancestor(support, own_event, table)
        columns = torch.arange(support.shape[1], device=support.device).expand_as(support)
        rest = support.shape[1]
        event = torch.where(own_event, columns, torch.where(parent >= 0, parent, rest))
        inclusive = torch.where(own_event, mass, 0.0)
        nested = torch.zeros_like(inclusive).scatter_add_(1, parent.clamp(min=0), inclusive * (parent >= 0))
        exclusive = (inclusive - nested).clamp(min=0)
        teacher_rest = (1 - exclusive.sum(1)).clamp(min=0)
        log_q = torch.cat([exclusive, teacher_rest.unsqueeze(1)], 1).clamp(min=FLOOR).log().float()
        supervised = residue > LEAST_RESIDUE_MASS
    p = log_p.gather(1, support).exp() * counts
    events = torch.zeros(len(p), rest + 1, dtype=p.dtype, device=p.device).scatter_add(1, event, p)
    told = events[:, :rest]
    student_rest = (1 - told.sum(1, keepdim=True)).clamp(min=FLOOR * FLOOR)
    events = torch.cat([told, student_rest], 1)
    present = events > 0
    log_events = torch.where(present, events, 1.0).log()
    cost = (torch.where(present, events, 0.0) * (log_events - log_q)).sum(1)
    return PrefixTerms(
        torch.where(supervised, cost, 0.0), supervised, student_rest.squeeze(1).detach(), teacher_rest.float()
    )


def prefix_sampled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens_n: Tensor,
    residue_n: Tensor,
    chain_n: Tensor,
    table: PrefixTable,
) -> PrefixTerms:
    """Eq. 3 across tokenizers: the sampled token's ``log p(y) - log m(y)`` with the policy gradient of `sampled_token`.

    Along a response the m(y) multiply to the teacher's probability of the text in its own tokens, so the costs add up to
    the log-ratio of the whole text (and, between two common boundaries, of that chunk).
    """
    log_p = student_logits.float().log_softmax(-1)
    chosen = log_p.gather(1, tokens_n.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        cumulative = sorted_mass(teacher_logits, table.order_V)
        mass, _, residue = _masses(cumulative, residue_n, tokens_n.unsqueeze(1), table)
        chain = (chain_n.double() - residue.clamp(min=1e-30).log()).exp()
        mass = torch.where(chain_n.isnan(), mass.squeeze(1), chain).clamp(FLOOR, 1.0)
        supervised = residue > LEAST_RESIDUE_MASS
        cost = torch.where(supervised, chosen - mass.log().float(), 0.0)
        rest = 1 - chosen.exp()
    return PrefixTerms(cost + cost * (chosen - chosen.detach()), supervised, rest, (1 - mass).float())


@torch.no_grad()
def chain_log_mass(teacher_logits_eV: Tensor, low_e: Tensor, high_e: Tensor, order_V: Tensor) -> Tensor:
    """Log mass of one range per row: teacher logits ``[e, V_T]`` -> ``[e]``, float64."""
    cumulative = sorted_mass(teacher_logits_eV, order_V)
    return range_mass(cumulative, low_e.unsqueeze(1), high_e.unsqueeze(1)).squeeze(1).clamp(min=1e-30).log()
