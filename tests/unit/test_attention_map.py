"""Bounded attention maps against whole attention matrices: values, gradients, what is masked, and what is kept."""

import pytest
import torch

from oprd.objectives import attention_map, attention_map_loss, key_places, teacher_maps

H, D = 4, 6
LENGTHS = (5, 1, 9)  # documents side by side, as in a packed row or in rows without padding
P = sum(LENGTHS)


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"slices of {rows}")
def sliced(request, monkeypatch):
    monkeypatch.setattr(attention_map, "rows_that_fit", lambda bytes_per_row, device: request.param)


def setting(*, groups=2, n=9, dtype=torch.float64, teacher_groups=2):
    """Queries and keys of both sides, and the supervised places in no order, with both ends of a document among them."""
    query, other_query = torch.randn(2, P, H, D).to(dtype)
    key, other_key = torch.randn(P, groups, D).to(dtype), torch.randn(P, teacher_groups, D).to(dtype)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    places = torch.cat([torch.tensor([0, 4, 5, 6, P - 1]), torch.tensor([2, 8, 10, 12])])[torch.randperm(9)][:n]
    own = (query.requires_grad_(), key.requires_grad_())
    return own, (other_query, other_key), places, positions[places], torch.rand(n)


def seen(keys, window):
    """The definition, one query and one key at a time: bool [P, P]."""
    mask, start = torch.zeros(P, P, dtype=torch.bool), 0
    for length in LENGTHS:
        for t in range(length):
            for s in range(t + 1):
                if (t - s < keys or s == 0) and (window is None or t - s < window):
                    mask[start + t, start + s] = True
        start += length
    return mask


def whole_map(query, key, keys, scaling, window):
    """Softmax of the whole matrix of scores, [P, H, P]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("phd,shd->phs", query, key) * scaling
    return scores.masked_fill(~seen(keys, window).unsqueeze(1), -torch.inf).softmax(-1)


def plain(own, other, places, weights, keys, scaling, other_scaling, window):
    p, q = (whole_map(*x, keys, s, window)[places] for x, s in ((own, scaling), (other, other_scaling)))
    kl = torch.where(q > 0, q * (q.log() - p.clamp(min=1e-300).log()), 0).sum(-1)
    return (weights.to(kl) * kl.mean(-1)).sum()


@pytest.mark.parametrize("window", [None, 3, 6], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("keys", [1, 4, 20])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_whole_matrices_with_gradients(sliced, groups, keys, window):
    own, other, places, positions, weights = setting(groups=groups)
    maps = teacher_maps(*other, places, positions, keys, 0.7, window, dtype=torch.float64)
    loss = attention_map_loss(*own, maps, places, positions, weights.double(), window=window)
    slow = plain(own, other, places, weights, keys, D**-0.5, 0.7, window)
    torch.testing.assert_close(loss, slow)
    ours, twin = (torch.autograd.grad(3 * x, own, allow_unused=True) for x in (loss, slow))
    for mine, theirs in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert loss.item() > 1e-3
    assert all(g.abs().max() > 1e-3 for g in ours)


def test_gradcheck():
    own, other, places, positions, weights = setting(n=4)
    maps = teacher_maps(*other, places, positions, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k: attention_map_loss(q, k, maps, places, positions, weights.double(), scaling=0.9, window=7), own
    )


@pytest.mark.parametrize("keys", [2, 4, 20])
def test_maps_are_the_whole_softmax_where_all_keys_fit(sliced, keys):
    _, other, places, positions, _ = setting()
    maps = teacher_maps(*other, places, positions, keys, dtype=torch.float64).exp()
    whole = whole_map(*other, keys, D**-0.5, None)
    for n, (place, position) in enumerate(zip(places.tolist(), positions.tolist(), strict=True)):
        for column in range(keys + 1):
            back = position if column == keys else column
            exists = back <= position and (column < keys or position >= keys)
            expected = whole[place, :, place - back] if exists else torch.zeros(H)
            torch.testing.assert_close(maps[n, :, column], expected, check_dtype=False)
    torch.testing.assert_close(maps.sum(-1), torch.ones(len(places), H).double())


def test_key_places_by_hand():
    places, exists = key_places(torch.tensor([10, 14, 22]), torch.tensor([0, 4, 7]), 3)
    assert places.tolist() == [[10, 10, 10, 10], [14, 13, 12, 10], [22, 21, 20, 15]]
    assert exists.tolist() == [[True, False, False, False], [True] * 4, [True] * 4]
    _, exists = key_places(torch.tensor([14, 22]), torch.tensor([4, 7]), 3, window=5)
    assert exists.tolist() == [[True] * 4, [True, True, True, False]]
    _, exists = key_places(torch.tensor([12, 13]), torch.tensor([2, 3]), 3)  # the first token once, not twice
    assert exists.tolist() == [[True, True, True, False], [True] * 4]
    with pytest.raises(ValueError, match="at least 1"):
        key_places(torch.tensor([1]), torch.tensor([1]), 0)


def test_equal_maps_cost_nothing_and_push_nowhere(sliced):
    """Also when the teacher's are kept in half precision: what rounding does to their sum is taken back."""
    own, _, places, positions, weights = setting()
    exact = [x.detach() for x in own]
    for dtype, loss_below, gradient_below in ((torch.float64, 1e-12, 1e-12), (torch.float16, 1e-6, 1e-3)):
        maps = teacher_maps(*exact, places, positions, 4, dtype=dtype)
        loss = attention_map_loss(*own, maps, places, positions, weights.double())
        assert -1e-12 <= loss.item() < loss_below
        assert all(g.abs().max() < gradient_below for g in torch.autograd.grad(loss, own))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_compared_in_float32(sliced, dtype):
    own, other, places, positions, weights = setting(dtype=dtype)
    maps = teacher_maps(*other, places, positions, 4)
    assert maps.dtype == torch.float16
    exact = tuple(x.detach().float().requires_grad_() for x in own)
    loss, twin = (attention_map_loss(*x, maps, places, positions, weights) for x in (own, exact))
    assert loss.dtype == torch.float32
    assert loss.equal(twin)
    for mine, theirs in zip(*(torch.autograd.grad(x, y) for x, y in ((loss, own), (twin, exact))), strict=True):
        assert mine.equal(theirs.to(dtype))  # rounded once


def test_a_key_that_the_teacher_does_not_see_counts_for_neither():
    """Another window there: as if the student had the narrower one too."""
    own, other, places, positions, weights = setting()
    maps = teacher_maps(*other, places, positions, 4, window=2, dtype=torch.float64)
    wide, narrow = (attention_map_loss(*own, maps, places, positions, weights.double(), window=w) for w in (None, 2))
    torch.testing.assert_close(wide, narrow)
    full = teacher_maps(*other, places, positions, 4, dtype=torch.float64)
    torch.testing.assert_close(attention_map_loss(*own, full, places, positions, weights.double(), window=2), narrow)


def test_documents_do_not_see_each_other():
    own, other, places, positions, weights = setting()
    maps = teacher_maps(*other, places, positions, 20, dtype=torch.float64)
    spoiled = tuple(x.detach().clone() for x in own)
    first = places < LENGTHS[0]
    for x in spoiled:
        x[LENGTHS[0] :] = float("nan")
    args = (maps[first], places[first], positions[first], weights[first].double())
    assert attention_map_loss(*spoiled, *args).equal(attention_map_loss(*own, *args))


@pytest.mark.parametrize("frozen", [0, 1], ids=["query", "key"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    own, other, places, positions, weights = setting()
    maps = teacher_maps(*other, places, positions, 4)
    args = (maps, places, positions, weights)
    both = torch.autograd.grad(attention_map_loss(*own, *args), own)
    own[frozen].requires_grad_(False)
    (one,) = torch.autograd.grad(attention_map_loss(*own, *args), own[1 - frozen])
    assert one.equal(both[1 - frozen])


def test_without_positions_it_is_zero_with_a_live_graph():
    own, other, places, positions, weights = setting(n=0)
    maps = teacher_maps(*other, places, positions, 4)
    loss = attention_map_loss(*own, maps, places, positions, weights)
    assert loss.item() == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, own))


def test_nothing_of_the_size_of_the_gathered_keys_is_kept():
    own, other, places, positions, weights = setting()
    maps = teacher_maps(*other, places, positions, 4)
    inputs = {x.data_ptr() for x in (*own, maps, places, positions, weights)}
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.add(x.data_ptr()), x)[1], lambda x: x):
        loss = attention_map_loss(*own, maps, places, positions, weights)
    assert loss.grad_fn is not None
    assert kept == inputs


def test_heads_and_queries_must_match():
    own, other, places, positions, weights = setting()
    maps = teacher_maps(*other, places, positions, 4)
    with pytest.raises(ValueError, match=r"9 queries and 3 heads, the student's of 9 and 4\. .* as many heads"):
        attention_map_loss(*own, maps[:, :3], places, positions, weights)
    with pytest.raises(ValueError, match="8 queries"):
        attention_map_loss(*own, maps[1:], places, positions, weights)
    with pytest.raises(ValueError, match="3 key heads cannot serve 4"):
        attention_map_loss(own[0], torch.randn(P, 3, D), maps, places, positions, weights)
