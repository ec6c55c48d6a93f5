"""A block's influence against its slow twin: all hidden states kept, one unpadded row at a time."""

from itertools import pairwise

import pytest
import torch

from oprd.compression import choose_blocks, measure_influence
from oprd.states import Reading
from tiny import ARCHITECTURES, ATTENTIONS, VOCAB, tiny_model


def rows(seed=0, lengths=(5, 2, 7, 4)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (length,), generator=generator) for length in lengths]


def reading(found):
    """Padded on the right, with an id that is a token."""
    width = max(map(len, found))
    ids = torch.stack([torch.cat([row, torch.full((width - len(row),), 9)]) for row in found])
    mask = torch.stack([torch.arange(width) < len(row) for row in found]).long()
    return Reading(ids, mask)


@torch.no_grad()
def slow_influence(model, found):
    """transformers gives the last state after the final norm; with weights of one that changes no direction."""
    cosines = []
    for row in found:
        states = model(input_ids=row.unsqueeze(0), output_hidden_states=True, use_cache=False).hidden_states
        for position in range(len(row)):
            at = [h[0, position] for h in states]
            cosines.append([torch.dot(a, b) / (a.norm() * b.norm()) for a, b in pairwise(at)])
    return 1 - torch.tensor(cosines).mean(0)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *ATTENTIONS])
def test_influence_equals_its_slow_twin(architecture):
    model = tiny_model(architecture).eval()
    found = measure_influence(model, [reading(rows())])
    assert found.positions == 18
    torch.testing.assert_close(torch.tensor(found.values), slow_influence(model, rows()).float(), atol=1e-5, rtol=1e-5)
    assert len(set(found.values)) == 3


def test_batches_and_order_do_not_matter():
    model, all_rows = tiny_model(), rows(lengths=(5, 2, 7, 4, 6, 3))
    whole = measure_influence(model, [reading(all_rows)])
    parts = measure_influence(model, [reading(all_rows[4:]), reading(all_rows[1:4]), reading(all_rows[:1])])
    assert parts.values == pytest.approx(whole.values, abs=1e-6)
    assert parts.positions == whole.positions == 27


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    measure_influence(model, [reading(rows())])
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_the_model_may_write_between_two_readings():
    """Positions that it reads for itself do not count."""
    model = tiny_model().eval()

    def lazily():
        for row in rows():
            model(input_ids=torch.full((3, 9), 4))
            yield reading([row])

    assert measure_influence(model, lazily()).values == pytest.approx(
        measure_influence(model, [reading(rows())]).values, abs=1e-6
    )


def test_no_positions_are_refused():
    with pytest.raises(ValueError, match=r"no position to measure influence at\. Give prompts"):
        measure_influence(tiny_model(), [])


def test_states_that_are_not_finite_are_named():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="states around block 2 are not finite"):
        measure_influence(model, [reading(rows())])


@pytest.mark.parametrize(
    ("influence", "keep", "kept"),
    [
        ([0.9, 0.1, 0.3, 0.2, 0.5], 4, [1, 3, 4, 5]),
        ([0.9, 0.1, 0.3, 0.2, 0.5], 3, [1, 3, 5]),
        ([0.0, 0.1, 0.3, 0.2, 0.0], 4, [1, 3, 4, 5]),  # the ends stay
        ([0.0, 0.1, 0.3, 0.2, 0.0], 2, [1, 5]),
        ([0.5, 0.2, 0.2, 0.2, 0.5], 4, [1, 2, 3, 5]),  # of equal ones the higher goes
        ([0.5, 0.2, 0.2, 0.2, 0.5], 3, [1, 2, 5]),
    ],
)
def test_blocks_of_lowest_influence_go(influence, keep, kept):
    assert choose_blocks(influence, keep) == kept


@pytest.mark.parametrize("keep", [-1, 0, 1, 4, 9])
def test_counts_that_cannot_be(keep):
    with pytest.raises(ValueError, match=f"{keep} of 4 layers cannot be kept by influence.*2 to 3"):
        choose_blocks([0.1] * 4, keep)
