"""From a rollout to what each model reads and the pairs of positions that are compared.

Shapes: B sequences, P prompt columns, C completion columns, S columns read, N pairs.

Everything downstream works on pairs. With one tokenizer and one prompt the pairs are the identity; with another prompt
they are a shift; with another tokenizer they are the places where both have consumed the same text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oprd.objectives.prefix_marginal import PrefixTable

STATE_AT = ("predictive", "token")


@dataclass(frozen=True)
class Reading:
    """What one model reads: right-padded ids and their mask, ``[B, S]``.

    Or, packed, one row (B = 1) of documents of the given ``lengths``, with the place of each token in its document.
    """

    ids_BS: Tensor
    mask_BS: Tensor
    positions_BS: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def is_packed(self) -> bool:
        return self.lengths is not None

    def document_of(self, place_N: Tensor) -> Tensor:
        """The document of each place ``row * S + column``, ``[N]``: its row or, packed, the number of its document."""
        if self.lengths is None:
            return place_N // self.ids_BS.shape[1]
        ends = torch.tensor(self.lengths, device=place_N.device).cumsum(0)
        return torch.searchsorted(ends, place_N, right=True)

    def position_of(self, place_N: Tensor) -> Tensor:
        """How many tokens of its document are before each place ``row * S + column``, ``[N]``."""
        if self.positions_BS is None:
            return place_N % self.ids_BS.shape[1]
        return self.positions_BS.flatten()[place_N]


@dataclass(frozen=True)
class PositionPairs:
    """N places where student and teacher have consumed the same text: row, and a column for each side."""

    row_N: Tensor
    student_N: Tensor
    teacher_N: Tensor

    def __len__(self) -> int:
        return self.row_N.shape[0]

    def of_student(self, states_BSd: Tensor) -> Tensor:
        """The student's states at the pairs, ``[B, S, d] -> [N, d]``."""
        return states_BSd.flatten(0, 1).index_select(0, self.student_places(states_BSd.shape[1]))

    def student_places(self, width: int) -> Tensor:
        """The pairs in the student's states as one list of ``B * width``, ``[N]``; no place comes twice."""
        return self.row_N * width + self.student_N

    def of_teacher(self, states_BSd: Tensor) -> Tensor:
        """The teacher's states at the pairs, ``[B, S, d] -> [N, d]``."""
        return states_BSd.flatten(0, 1).index_select(0, self.teacher_places(states_BSd.shape[1]))

    def teacher_places(self, width: int) -> Tensor:
        """The pairs in the teacher's states as one list of ``B * width``, ``[N]``; a place may come twice."""
        return self.row_N * width + self.teacher_N


@dataclass(frozen=True)
class PrefixRows:
    """What output losses need across tokenizers: the table and each output pair's row of it; and for sampled tokens that
    take several teacher tokens, E steps: which output pair, and where the teacher says which range of its tokens."""

    table: PrefixTable
    residue_N: Tensor
    chain_pair_E: Tensor
    chain_row_E: Tensor
    chain_column_E: Tensor
    chain_low_E: Tensor
    chain_high_E: Tensor


@dataclass(frozen=True)
class TeacherText:
    """What a teacher with a prompt or a tokenizer of its own reads, and where that meets the student's tokens.

    ``before_BC``, ``after_BC``: teacher column of the state before and after response token t, -1 where there is none.
    ``anchor_BC``: column of the teacher's last boundary before token t; ``residue_BC`` numbers the bytes since.
    ``chain_BE4``: rows ``(t, column, low, high)``, t = -1 for padding.
    """

    reading: Reading
    before_BC: Tensor
    after_BC: Tensor
    anchor_BC: Tensor
    residue_BC: Tensor
    chain_BE4: Tensor


@dataclass(frozen=True)
class Rollout:
    """One micro-batch, ready for both models.

    ``state_*`` are the positions whose hidden states are compared, ``output_*`` those whose next-token distributions
    are. Weights already hold every denominator. ``transition_weights_N`` are those of the changes that lead to a state pair from
    the one before it in its response, 0 for a first one. ``prefix`` is there if the tokenizers differ, ``student_prefix`` if the
    student reads the start of its documents apart, without gradient.
    """

    student: Reading
    teacher: Reading
    state_pairs: PositionPairs
    state_weights_N: Tensor
    output_pairs: PositionPairs
    output_weights_N: Tensor
    output_tokens_N: Tensor
    prefix: PrefixRows | None = None
    student_prefix: Reading | None = None
    transition_weights_N: Tensor | None = None


def close_gaps(ids_BS: Tensor, mask_BS: Tensor) -> Reading:
    """Move each row's real tokens to the left, in order, and drop the columns that nobody uses."""
    order = torch.argsort((~mask_BS).to(torch.int8), dim=1, stable=True)
    width = int(mask_BS.sum(dim=1).max())
    return Reading(ids_BS.gather(1, order)[:, :width], mask_BS.gather(1, order)[:, :width])


def make_rollout(
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    completion_ids_BC: Tensor,
    completion_mask_BC: Tensor,
    *,
    state_weights_BC: Tensor,
    output_weights_BC: Tensor,
    transition_weights_BC: Tensor | None = None,
    state_at: str = "predictive",
    teacher_text: TeacherText | None = None,
    prefix_table: Callable[[Tensor], tuple[PrefixTable, Tensor]] | None = None,
) -> Rollout:
    """Readings and pairs of one micro-batch.

    Args:
        prompt_ids_BP, completion_ids_BC: padded on any side; the masks say what is real.
        state_weights_BC, output_weights_BC: weight per response token, 0 where it is not supervised.
        transition_weights_BC: of the change that leads to a supervised state, if changes are compared.
        state_at: ``predictive`` compares the state that predicts y_t (the input position before it, the last prompt token
            for t = 1); ``token`` the state at y_t itself. Distributions are always the predictive ones.
        teacher_text: what the teacher reads; None if it reads the student's tokens, so that a position pairs with itself.
        prefix_table: from the residues that occur to the table of them and each one's row in it; across tokenizers only.

    Raises:
        ValueError: a row without a prompt has no state that predicts its first token.
    """
    if state_at not in STATE_AT:
        raise ValueError(f"state_at must be one of {', '.join(STATE_AT)}, got {state_at!r}.")
    prompt_mask, completion_mask = prompt_mask_BP.bool(), completion_mask_BC.bool()
    prompt_length_B = prompt_mask.sum(dim=1)
    if bool((prompt_length_B == 0).any()):
        raise ValueError(
            "A prompt has no tokens, so nothing predicts its first response token. Give every row a prompt."
        )
    reading = close_gaps(torch.cat([prompt_ids_BP, completion_ids_BC], 1), torch.cat([prompt_mask, completion_mask], 1))
    column_BC = prompt_length_B.unsqueeze(1) + completion_mask.cumsum(dim=1) - 1  # of token y_t, in the closed row

    def pairs(weights_BC: Tensor, shift: int, partner_BC: Tensor | None) -> tuple[PositionPairs, Tensor]:
        supervised = (weights_BC > 0) & completion_mask
        if partner_BC is not None:
            supervised = supervised & (partner_BC >= 0)
        row_N, t_N = supervised.nonzero(as_tuple=True)
        column_N = column_BC[row_N, t_N] - shift
        other_N = column_N if partner_BC is None else partner_BC[row_N, t_N]
        return PositionPairs(row_N, column_N, other_N), t_N

    predictive, text = state_at == "predictive", teacher_text
    partner_BC = None if text is None else text.before_BC if predictive else text.after_BC
    state_pairs, state_t_N = pairs(state_weights_BC, 1 if predictive else 0, partner_BC)
    output_pairs, output_t_N = pairs(output_weights_BC, 1, None if text is None else text.anchor_BC)
    prefix = None
    if prefix_table is not None:
        prefix = _prefix_rows(text, output_pairs, output_t_N, prefix_table)
    return Rollout(
        student=reading,
        teacher=reading if text is None else text.reading,
        state_pairs=state_pairs,
        state_weights_N=state_weights_BC[state_pairs.row_N, state_t_N],
        output_pairs=output_pairs,
        output_weights_N=output_weights_BC[output_pairs.row_N, output_t_N],
        output_tokens_N=completion_ids_BC[output_pairs.row_N, output_t_N],
        prefix=prefix,
        transition_weights_N=None
        if transition_weights_BC is None
        else transition_weights_BC[state_pairs.row_N, state_t_N],
    )


def _prefix_rows(
    text: TeacherText,
    pairs: PositionPairs,
    t_N: Tensor,
    prefix_table: Callable[[Tensor], tuple[PrefixTable, Tensor]],
) -> PrefixRows:
    table, residue_N = prefix_table(text.residue_BC[pairs.row_N, t_N])
    number_BC = torch.full_like(text.residue_BC, -1)
    number_BC[pairs.row_N, t_N] = torch.arange(len(pairs), device=t_N.device)
    t_BE, column_BE, low_BE, high_BE = text.chain_BE4.unbind(-1)
    pair_BE = number_BC.gather(1, t_BE.clamp(min=0)).masked_fill(t_BE < 0, -1)
    row_E, step_E = (pair_BE >= 0).nonzero(as_tuple=True)
    chain = (chain_BE[row_E, step_E] for chain_BE in (column_BE, low_BE, high_BE))
    return PrefixRows(table, residue_N, pair_BE[row_E, step_E], row_E, *chain)
