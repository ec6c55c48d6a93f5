import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.objectives import map_layers, select_layers, select_positions


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [1, 2, 3, 4, 5]),
        ("last", [5]),
        ("even", [2, 4]),
        ("odd", [1, 3, 5]),
        ([4, 2, 2], [2, 4]),
        ([-1, 1], [1, 5]),
        (3, [3]),
    ],
)
def test_select_layers(spec, expected):
    assert select_layers(spec, 5) == expected


@pytest.mark.parametrize(
    ("spec", "depth", "message"),
    [
        ("first", 5, "all, last, even, odd"),
        ([0], 5, "outside 1..5"),
        ([6], 5, r"\[6\]"),
        ([-6], 5, "outside"),
        ("even", 1, "nothing"),
    ],
)
def test_select_layers_refuses(spec, depth, message):
    with pytest.raises(ValueError, match=message):
        select_layers(spec, depth)


def naive_positions(row, spec, k):
    """The obvious loop."""
    where = [i for i, on in enumerate(row) if on]
    kept = {"all": where, "last": where[-1:], "first_k": where[:k], "last_k": where[-k:]}[spec]
    return [i in kept for i in range(len(row))]


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    spec=st.sampled_from(["all", "last", "first_k", "last_k"]),
    k=st.integers(1, 8),
)
def test_select_positions_equals_the_loop(rows, spec, k):
    chosen = select_positions(torch.tensor(rows), spec, k)
    assert chosen.tolist() == [naive_positions(row, spec, k) for row in rows]


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    k=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_random_k_keeps_k_of_each_row_and_repeats_with_its_generator(rows, k, seed):
    mask = torch.tensor(rows)
    chosen = [select_positions(mask, "random_k", k, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert chosen[0].equal(chosen[1])
    assert not (chosen[0] & ~mask).any()
    assert chosen[0].sum(1).tolist() == [min(sum(row), k) for row in rows]


def test_random_k_takes_any_position_equally_often(mask_BT):
    draws = torch.stack([select_positions(mask_BT, "random_k", 2) for _ in range(2000)]).float().mean(0)
    expected = mask_BT * (2 / mask_BT.sum(1, keepdim=True).clamp(min=2))
    torch.testing.assert_close(draws, expected, atol=0.05, rtol=0)  # over four standard deviations
    assert select_positions(mask_BT[:, :0], "random_k", 2).shape == (4, 0)


def test_select_positions_counts_positions_not_columns(mask_BT):
    # The second row's last two positions are columns 5 and 7; padding side and holes do not matter.
    assert select_positions(mask_BT, "last_k", 2)[1].nonzero().flatten().tolist() == [5, 7]
    assert select_positions(mask_BT, "first_k", 100).equal(mask_BT)


@pytest.mark.parametrize(
    ("spec", "k", "message"),
    [
        ("last_k", None, "position_k"),
        ("first_k", 0, "position_k"),
        ("random_k", None, "position_k"),
        ("some", 1, "all, last"),
    ],
)
def test_select_positions_refuses(mask_BT, spec, k, message):
    with pytest.raises(ValueError, match=message):
        select_positions(mask_BT, spec, k)


def test_a_generator_that_would_be_ignored_is_refused(mask_BT):
    with pytest.raises(ValueError, match="leave the generator out"):
        select_positions(mask_BT, "last_k", 2, generator=torch.Generator())


@given(student=st.integers(2, 80), teacher=st.integers(1, 80))
def test_map_layers_is_eq_11(student, teacher):
    mapped = map_layers(student, teacher)
    assert mapped[0] == 1
    assert mapped[-1] == teacher
    assert mapped == sorted(mapped)
    for layer, image in enumerate(mapped, 1):
        assert abs(image - 1 - (layer - 1) / (student - 1) * (teacher - 1)) <= 0.5 + 1e-9


def test_map_layers_published_pairs():
    assert map_layers(28, 28) == list(range(1, 29))
    assert map_layers(28, 36)[13] == round(13 / 27 * 35) + 1
    assert map_layers(1, 7) == [7]
