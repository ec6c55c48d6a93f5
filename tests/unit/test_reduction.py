import pytest
import torch

from oprd.objectives import position_weights


def test_sequence_weights_by_hand(mask_BT):
    weights = position_weights(mask_BT, "sequence")
    # Three rows have positions; the fourth weighs nothing.
    torch.testing.assert_close(weights[0], torch.full((8,), 1 / 8 / 3))
    torch.testing.assert_close(weights[1], mask_BT[1] / 4 / 3)
    torch.testing.assert_close(weights[2], mask_BT[2] / 2 / 3)
    assert weights[3].eq(0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_token_weights_by_hand(mask_BT):
    torch.testing.assert_close(position_weights(mask_BT, "token"), mask_BT / 14)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_global_denominators_make_pieces_add_up(mask_BT, reduction):
    whole = position_weights(mask_BT, reduction)
    pieces = [
        position_weights(rows, reduction, num_sequences=torch.tensor(3), num_positions=torch.tensor(14))
        for rows in mask_BT.split(1)
    ]
    torch.testing.assert_close(torch.cat(pieces), whole)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_nothing_supervised_is_all_zero(reduction):
    assert position_weights(torch.zeros(2, 3, dtype=torch.bool), reduction).eq(0).all()


def test_unknown_reduction():
    with pytest.raises(ValueError, match="sequence, token"):
        position_weights(torch.ones(1, 1), "mean")
