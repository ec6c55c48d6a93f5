"""From a rollout to what each model reads and the pairs of positions that are compared.

Shapes: B sequences, P prompt columns, C completion columns, S columns read, N pairs.

Everything downstream works on pairs. With one tokenizer and one prompt the pairs are the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STATE_AT = ("predictive", "token")


@dataclass(frozen=True)
class Reading:
    """What one model reads: right-padded ids and their mask, ``[B, S]``."""

    ids_BS: Tensor
    mask_BS: Tensor


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
        return states_BSd[self.row_N, self.student_N]

    def of_teacher(self, states_BSd: Tensor) -> Tensor:
        """The teacher's states at the pairs, ``[B, S, d] -> [N, d]``."""
        return states_BSd[self.row_N, self.teacher_N]


@dataclass(frozen=True)
class Rollout:
    """One micro-batch, ready for both models.

    ``state_*`` are the positions whose hidden states are compared, ``output_*`` those whose next-token distributions
    are. Weights already hold every denominator.
    """

    student: Reading
    teacher: Reading
    state_pairs: PositionPairs
    state_weights_N: Tensor
    output_pairs: PositionPairs
    output_weights_N: Tensor
    output_tokens_N: Tensor


def close_gaps(ids_BS: Tensor, mask_BS: Tensor) -> Reading:
    """Move each row's real tokens to the left, in order, and drop the columns that nobody uses."""
    order = torch.argsort((~mask_BS).to(torch.int8), dim=1, stable=True)
    width = int(mask_BS.sum(dim=1).max())
    return Reading(ids_BS.gather(1, order)[:, :width], mask_BS.gather(1, order)[:, :width])


def same_tokens(
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    completion_ids_BC: Tensor,
    completion_mask_BC: Tensor,
    *,
    state_weights_BC: Tensor,
    output_weights_BC: Tensor,
    state_at: str = "predictive",
) -> Rollout:
    """Both models read the same tokens, so a position pairs with itself.

    Args:
        prompt_ids_BP, completion_ids_BC: padded on any side; the masks say what is real.
        state_weights_BC, output_weights_BC: weight per response token, 0 where it is not supervised.
        state_at: ``predictive`` compares the state that predicts y_t (the input position before it, the last prompt token
            for t = 1); ``token`` the state at y_t itself. Distributions are always the predictive ones.

    Raises:
        ValueError: a row without a prompt has no state that predicts its first token.
    """
    if state_at not in STATE_AT:
        raise ValueError(f"state_at must be one of {', '.join(STATE_AT)}, got {state_at!r}.")
    prompt_mask, completion_mask = prompt_mask_BP.bool(), completion_mask_BC.bool()
    prompt_length_B = prompt_mask.sum(dim=1)
    reading = close_gaps(torch.cat([prompt_ids_BP, completion_ids_BC], 1), torch.cat([prompt_mask, completion_mask], 1))
    column_BC = prompt_length_B.unsqueeze(1) + completion_mask.cumsum(dim=1) - 1  # of token y_t, in the closed row

    def pairs(weights_BC: Tensor, shift: int) -> tuple[PositionPairs, Tensor]:
        supervised = (weights_BC > 0) & completion_mask
        row_N, t_N = supervised.nonzero(as_tuple=True)
        column_N = column_BC[row_N, t_N] - shift
        return PositionPairs(row_N, column_N, column_N), t_N

    if bool((prompt_length_B == 0).any()):
        raise ValueError(
            "A prompt has no tokens, so nothing predicts its first response token. Give every row a prompt."
        )
    state_pairs, state_t_N = pairs(state_weights_BC, 1 if state_at == "predictive" else 0)
    output_pairs, output_t_N = pairs(output_weights_BC, 1)
    return Rollout(
        student=reading,
        teacher=reading,
        state_pairs=state_pairs,
        state_weights_N=state_weights_BC[state_pairs.row_N, state_t_N],
        output_pairs=output_pairs,
        output_weights_N=output_weights_BC[output_pairs.row_N, output_t_N],
        output_tokens_N=completion_ids_BC[output_pairs.row_N, output_t_N],
    )
