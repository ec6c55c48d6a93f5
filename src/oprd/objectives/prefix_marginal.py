"""Next-token objectives across tokenizers: the teacher's distribution over the student's tokens, summed over its own.

At every student position the teacher stands at its last boundary, ``u`` bytes behind (the residue). Student token s then has

    m(s) = sum of q(v) over teacher tokens v whose bytes start with u + s,  relative to those that start with u.

With the teacher's tokens sorted by bytes every such set is a range (`oprd.objectives.range_mass`). Shapes: n positions, V_T and V_S tokens, K support tokens, M table entries, U residues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oprd.objectives.range_mass import mass_of_ranges, sorted_mass

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
    ``rank[s] < rank[t] <= last[s]``. ``canonical_V``: of student tokens with the same bytes, the one that is listed.
    """

    order_V: Tensor
    keys_M: Tensor
    low_M: Tensor
    high_M: Tensor
    residue_low_U: Tensor
    residue_high_U: Tensor
    rank_V: Tensor
    last_V: Tensor
    canonical_V: Tensor

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
def _masses(
    teacher_logits_nV: Tensor, residue_n: Tensor, tokens_nK: Tensor, table: PrefixTable
) -> tuple[Tensor, Tensor, Tensor]:
    """m(s) ``[n, K]``, which of them one teacher token can say, and the residue's own mass ``[n]``."""
    low, high, found = table.lookup(residue_n, tokens_nK)
    residue_low, residue_high = table.residue_low_U[residue_n], table.residue_high_U[residue_n]
    mass = sorted_mass(teacher_logits_nV, table.order_V).of(
        torch.cat([low, residue_low.unsqueeze(1)], 1), torch.cat([high, residue_high.unsqueeze(1)], 1)
    )
    residue = mass[:, -1]
    return torch.where(found, mass[:, :-1] / residue.clamp(min=1e-30).unsqueeze(1), 0.0), found, residue


def _extends(tokens_nK: Tensor, can_nK: Tensor, table: PrefixTable) -> Tensor:
    """Bool ``[n, K token, K prefix]``: the second's bytes are a proper prefix of the first's, and it can hold mass."""
    rank, last = table.rank_V[tokens_nK], table.last_V[tokens_nK]
    extends = (rank.unsqueeze(2) > rank.unsqueeze(1)) & (rank.unsqueeze(2) <= last.unsqueeze(1))
    return extends & can_nK.unsqueeze(1)


def _parents(extends: Tensor, rank_nK: Tensor) -> Tensor:
    """For every support token, the column of its longest prefix; -1 if it has none."""
    depth = torch.where(extends, rank_nK.unsqueeze(1), -1)  # of nested prefixes the longest sorts last
    deepest, column = depth.max(dim=2)
    return torch.where(deepest >= 0, column, -1)


def _without_children(inclusive_nK: Tensor, parent_nK: Tensor) -> Tensor:
    """What an event holds beyond the events nested in it."""
    held = torch.where(parent_nK >= 0, inclusive_nK, 0.0)
    nested = torch.zeros_like(inclusive_nK).scatter_add(1, parent_nK.clamp(min=0), held)
    return (inclusive_nK - nested).clamp(min=0)


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

    The support is the student's top ``k`` and the sampled token (``k=None``: the whole vocabulary). A support token s has an
    event, "the text goes on with s", if one teacher token can say it, or if it is the sampled one, whose probability along
    the actual text is ``chain_n`` where it takes several. Its mass is m(s) for the teacher and, for the student, the sum
    over all of its tokens that begin with s, in the support or not; a longer event within it is taken out on both sides, so
    events are disjoint. All else is one event, the rest. So the value is the reverse KL of two coarse-grained
    distributions: never above the full divergence, 0 where the two models agree, and exact where every student token has
    an event of its own. (A chain may run through teacher tokens shorter than another event's: then that event is widened to
    hold it, and masses that would exceed 1 are scaled.)

    Args:
        student_logits, teacher_logits: ``[n, V_S]``, ``[n, V_T]``, the teacher's at its anchors.
        tokens_n, residue_n: sampled token; row of the table.
        chain_n: log probability of the sampled token where it takes several teacher tokens (not yet relative to the
            residue), NaN where one is enough.
    """
    tokens_n = table.canonical_V[tokens_n]
    size = student_logits.shape[-1]
    if k is None or k >= size:
        support = torch.arange(size, device=tokens_n.device).expand(len(tokens_n), -1)
        counts = torch.ones_like(support, dtype=torch.bool)
    else:
        top = student_logits.detach().topk(k, dim=-1).indices
        support = torch.cat([top, tokens_n.unsqueeze(1)], 1)
        counts = torch.ones_like(support, dtype=torch.bool)
        counts[:, -1] = (top != tokens_n.unsqueeze(1)).all(1)
    with torch.no_grad():
        mass, found, residue = _masses(teacher_logits, residue_n, support, table)
        is_sampled = support == tokens_n.unsqueeze(1)
        event = (found | is_sampled) & counts
        chained = is_sampled & event & ~chain_n.isnan().unsqueeze(1)
        chain = (chain_n.double() - residue.clamp(min=1e-30).log()).exp().clamp(max=1.0).unsqueeze(1)
        mass = torch.where(event, torch.where(chained, chain, mass), 0.0)
        extends = _extends(support, event, table)
        widened = (extends & chained.unsqueeze(2)).any(1)  # events that the chain runs through
        mass = torch.where(widened, torch.maximum(mass, chain), mass)
        parent = torch.where(event, _parents(extends, table.rank_V[support]), -1)
        teacher = _without_children(mass, parent)
        teacher = teacher / teacher.sum(1, keepdim=True).clamp(min=1.0)
        teacher_rest = (1 - teacher.sum(1)).clamp(min=0)
        log_q = torch.cat([teacher, teacher_rest.unsqueeze(1)], 1).clamp(min=FLOOR).log().float()
        supervised = residue > LEAST_RESIDUE_MASS
    student = _without_children(torch.where(event, _student_mass(student_logits, support, table), 0.0), parent)
    student_rest = (1 - student.sum(1, keepdim=True)).clamp(min=FLOOR * FLOOR)
    events = torch.cat([student, student_rest], 1).float()
    present = events > 0
    log_events = torch.where(present, events, 1.0).log()
    cost = (torch.where(present, events, 0.0) * (log_events - log_q)).sum(1)
    return PrefixTerms(
        torch.where(supervised, cost, 0.0),
        supervised,
        student_rest.squeeze(1).detach().float(),
        teacher_rest.float(),
    )


def _student_mass(logits_nV: Tensor, support_nK: Tensor, table: PrefixTable) -> Tensor:
    """Student's mass on all tokens that begin with each support token, ``[n, K]``, float64: the token's own and that of the
    longer ones, which follow it in byte order."""
    first_nK = table.rank_V[support_nK]
    behind_nK = torch.maximum(table.last_V[support_nK], first_nK) + 1
    return mass_of_ranges(logits_nV, table.rank_V, first_nK, behind_nK)


def prefix_sampled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens_n: Tensor,
    residue_n: Tensor,
    chain_n: Tensor,
    table: PrefixTable,
) -> PrefixTerms:
    """Eq. 3 across tokenizers: the sampled token's ``log p(y) - log m(y)`` with the policy gradient of `sampled_token`.

    Along a response the m(y) multiply to the teacher's probability of whatever starts with the text in its own tokens: an upper
    bound of the text's, and equal to it where no longer token has mass. So the costs add up to the log-ratio of the whole
    text (and, between two common boundaries, of that chunk).
    """
    log_p = student_logits.float().log_softmax(-1)
    chosen = log_p.gather(1, tokens_n.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        listed = table.canonical_V[tokens_n].unsqueeze(1)
        mass, _, residue = _masses(teacher_logits, residue_n, listed, table)
        chain = (chain_n.double() - residue.clamp(min=1e-30).log()).exp()
        mass = torch.where(chain_n.isnan(), mass.squeeze(1), chain).clamp(FLOOR, 1.0)
        supervised = residue > LEAST_RESIDUE_MASS
        cost = torch.where(supervised, chosen - mass.log().float(), 0.0)
        rest = 1 - chosen.exp()
    return PrefixTerms(cost + cost * (chosen - chosen.detach()), supervised, rest, (1 - mass).float())


@torch.no_grad()
def chain_log_mass(teacher_logits_eV: Tensor, low_e: Tensor, high_e: Tensor, order_V: Tensor) -> Tensor:
    """Log mass of one range per row: teacher logits ``[e, V_T]`` -> ``[e]``, float64."""
    mass = sorted_mass(teacher_logits_eV, order_V).of(low_e.unsqueeze(1), high_e.unsqueeze(1))
    return mass.squeeze(1).clamp(min=1e-30).log()
