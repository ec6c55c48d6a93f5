import pytest
import torch

from oprd.objectives import position_weights, select_positions
from oprd.states import make_rollout
from oprd.states.views import close_gaps
from tiny import tiny_batch


def rollout_of(batch, *, state_mask=None, output_mask=None, **kwargs):
    generated = batch["completion_mask"].bool()
    weights = [position_weights(generated if mask is None else mask) for mask in (state_mask, output_mask)]
    return make_rollout(*batch.values(), state_weights_BC=weights[0], output_weights_BC=weights[1], **kwargs)


def test_close_gaps_keeps_order_and_drops_empty_columns():
    ids = torch.tensor([[9, 1, 2, 9, 3, 9], [9, 9, 4, 5, 9, 9]])
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    reading = close_gaps(ids, mask)
    assert reading.ids_BS[0].tolist() == [1, 2, 3]
    assert reading.ids_BS[1, :2].tolist() == [4, 5]
    assert reading.mask_BS.tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_pairs_equal_column_slicing(padding):
    """With one tokenizer and one prompt, the pairs are a slice of each row: the last prompt token to the last but one."""
    batch = tiny_batch(padding=padding)
    rollout = rollout_of(batch)
    states = torch.randn(*rollout.student.ids_BS.shape, 5)
    sliced, tokens = [], []
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        whole = torch.cat([prompt, completion])
        assert rollout.student.ids_BS[row][rollout.student.mask_BS[row]].equal(whole)
        sliced.append(states[row, len(prompt) - 1 : len(whole) - 1])
        tokens.append(completion)
    assert rollout.state_pairs.of_student(states).equal(torch.cat(sliced))
    assert rollout.state_pairs.of_teacher(states).equal(torch.cat(sliced))
    assert rollout.output_tokens_N.equal(torch.cat(tokens))
    assert rollout.output_pairs.of_student(states).equal(torch.cat(sliced))


def test_token_states_are_one_later_but_outputs_stay_predictive():
    batch = tiny_batch()
    predictive, token = rollout_of(batch), rollout_of(batch, state_at="token")
    assert (token.state_pairs.student_N - predictive.state_pairs.student_N).eq(1).all()
    assert token.output_pairs.student_N.equal(predictive.output_pairs.student_N)


def test_selection_and_holes_filter_the_pairs():
    batch = tiny_batch()
    holes = batch["completion_mask"].bool().clone()
    holes[0, 1:3] = False  # say, a tool's answer: read, not supervised
    chosen = select_positions(holes, "last_k", 2)
    rollout = rollout_of(batch, state_mask=chosen, output_mask=holes)
    assert len(rollout.output_pairs) == 5 + 2 + 7 + 4 - 2
    assert torch.bincount(rollout.state_pairs.row_N).tolist() == [2, 2, 2, 2]
    # Row 0: prompt of 3, response of 5; its last two tokens are at columns 6 and 7 of the closed row.
    assert rollout.state_pairs.student_N[:2].tolist() == [5, 6]
    torch.testing.assert_close(rollout.state_weights_N, torch.full((8,), 1 / 8))
    assert rollout.student.mask_BS.sum(1).tolist() == [8, 7, 9, 8]


def test_refusals():
    batch = tiny_batch()
    with pytest.raises(ValueError, match="predictive, token"):
        rollout_of(batch, state_at="after")
    batch["prompt_mask"][1] = 0
    with pytest.raises(ValueError, match="no tokens"):
        rollout_of(batch)
