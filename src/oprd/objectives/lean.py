"""Top-k losses renormalised on their support, without a full softmax (Eq. 5).

The renormalised loss depends on the logits of the support alone. So a pass without gradients over vocabulary tiles finds
the support, and only its K logits a position are computed with gradients, from gathered rows of the head.

Shapes: N positions, n of a chunk, V vocabulary, v of a tile, K support, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd.objectives.fused import HeadGradients, OutputTerms, value_and_slope
from oprd.objectives.output_space import choose_support, support_kl
from oprd.objectives.projection import Projection, rows_that_fit

TILE = 32_768  # tokens of a vocabulary tile
LEAST_VOCABULARY_PER_TOKEN = 128  # with less, gathering rows costs more than the dense products that it saves


def is_worth_it(k: int, vocabulary: int) -> bool:
    """Whether gathering pays for a support of k tokens."""
    return k * LEAST_VOCABULARY_PER_TOKEN <= vocabulary


@torch.no_grad()
def top_tokens(head: Projection, states_nd: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, ``[n, d] -> [n, min(k, V)]``, over tiles of the vocabulary, largest first."""
    best = ids = None
    for start in range(0, head.size, TILE):
        tile_nv = head.logits(states_nd, slice(start, start + TILE))
        values, found = tile_nv.topk(min(k, tile_nv.shape[1]), dim=1)
        found = found + start
        if best is not None:
            values, found = torch.cat([best, values], 1), torch.cat([ids, found], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            found = found.gather(1, order)
        best, ids = values, found
    return ids


def top_k_terms(
    student: Projection,
    teacher: Projection,
    student_Nd: Tensor,
    teacher_Nd: Tensor,
    weights_N: Tensor,
    k: int,
    support: str,
) -> OutputTerms:
    """`fused_terms` for `top_k_kl(..., renormalize=True)`: its loss, gradients and sums.

    The supported logits are products in float32 whatever autocast says; the search is in its dtype.

    Raises:
        ValueError: k below 1, an unknown support, or heads of different vocabularies.
    """
    if student.size != teacher.size:
        raise ValueError(
            f"The heads cover {student.size} and {teacher.size} tokens; cut both to the tokenizer's length."
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    gradients = HeadGradients(student, student_Nd)
    device, width = student_Nd.device, max(student_Nd.shape[1], teacher_Nd.shape[1])
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        weights_N = weights_N.to(student.exact)
        loss, total = weights_N.new_zeros(()), weights_N.new_zeros((), dtype=torch.float32)
        length = rows_that_fit(min(TILE, student.size) * student.exact.itemsize, device)
        for start in range(0, len(weights_N), length):
            part = slice(start, start + length)
            tokens_nK, counts_nK = choose_support(
                lambda part=part: top_tokens(student, student_Nd[part], k),
                lambda part=part: top_tokens(teacher, teacher_Nd[part], k),
                support,
            )
            step = rows_that_fit(tokens_nK.shape[1] * width * student.exact.itemsize, device)
            for low in range(0, len(tokens_nK), step):
                here = slice(low, low + step)
                tokens, counts = tokens_nK[here], counts_nK[here]
                rows = slice(start + low, start + low + len(tokens))
                own_rows_nKd, other_rows_nKd = student.rows(tokens), teacher.rows(tokens)
                own_nK = student.at_tokens(student_Nd[rows], tokens, own_rows_nKd)
                cost_n, slope_nK = value_and_slope(
                    lambda p, q, counts=counts: support_kl(p, q, counts, renormalize=True),
                    own_nK,
                    teacher.at_tokens(teacher_Nd[rows], tokens, other_rows_nKd),
                    gradients.wanted,
                )
                loss += (weights_N[rows] * cost_n).sum()
                total += cost_n.float().sum()
                if gradients.wanted:
                    slope_nK = student.uncap_(slope_nK, own_nK).mul_(weights_N[rows].unsqueeze(1) * student.factor)
                    gradients.add_at(rows, tokens, slope_nK, own_rows_nKd, student_Nd[rows].detach())
    return OutputTerms(gradients.attach(loss), {"output_divergence": total})
