import json
import math
import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from oprd.durability.random_numbers import random_state, set_random_state
from oprd.durability.trees import has_tree, load_tree, save_tree

CPU = torch.device("cpu")


def there_and_back(directory, tree):
    save_tree(directory, "state", tree)
    return load_tree(directory, "state")


def assert_same(one, other):
    assert type(one) is type(other), (one, other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.contiguous().flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    elif isinstance(one, np.ndarray | np.generic):
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    elif isinstance(one, dict):
        assert list(one) == list(other) and [type(k) for k in one] == [type(k) for k in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, float):
        assert np.float64(one).tobytes() == np.float64(other).tobytes() or (math.isnan(one) and math.isnan(other))
    else:
        assert one == other


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
KEYS = st.text() | st.integers() | st.just("!")
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(tree=TREES)
def test_any_plain_tree_comes_back_the_same(tmp_path_factory, tree):
    keys = [tree] if isinstance(tree, dict) else []
    if any(len({str(k) for k in node}) != len(node) for node in keys):
        return
    try:
        found = there_and_back(tmp_path_factory.mktemp("tree"), tree)
    except ValueError as error:  # 1 and "1" beside each other, below
        assert "cannot hold" in str(error)
        return
    assert_same(tree, found)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.int8, torch.bool],
    ids=str,
)
def test_tensors_of_every_kind(tmp_path, dtype):
    values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    tree = {
        "a": values,
        "b": values.T,
        "scalar": values[1, 2],
        "empty": values[:0],
        "view": values[1],
        3: (values, [values]),
    }
    assert_same(tree, there_and_back(tmp_path, tree))


def test_bits_of_floats_survive(tmp_path):
    tensor = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 0.1])
    tree = [tensor, 0.1 + 0.2, float("nan"), float("-inf"), -0.0, 5e-324, np.float32(0.1), np.arange(3, dtype=">u2")]
    assert_same(tree, there_and_back(tmp_path, tree))


@pytest.mark.parametrize("optim", ["AdamW", "SGD", "Adafactor"])
def test_an_optimiser_goes_on_as_if_nothing_had_been(tmp_path, optim):
    def build():
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}]
        if optim == "AdamW":
            chosen = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), amsgrad=True)
        elif optim == "SGD":
            chosen = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
        else:
            chosen = torch.optim.Adafactor(groups, lr=1e-2)
        plan = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 / (step + 1))
        return layer, chosen, plan

    def steps(layer, chosen, plan, count):
        for _ in range(count):
            layer(torch.randn(4, 5)).square().sum().backward()
            chosen.step()
            plan.step()
            chosen.zero_grad()

    layer, chosen, plan = build()
    steps(layer, chosen, plan, 3)
    save_tree(tmp_path, "optimizer", chosen.state_dict())
    save_tree(tmp_path, "scheduler", plan.state_dict())
    weights, drawn = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
    steps(layer, chosen, plan, 3)

    again, other, other_plan = build()
    again.load_state_dict(weights)
    other.load_state_dict(load_tree(tmp_path, "optimizer"))
    other_plan.load_state_dict(load_tree(tmp_path, "scheduler"))
    torch.set_rng_state(drawn)
    steps(again, other, other_plan, 3)
    for name, value in layer.state_dict().items():
        assert value.equal(again.state_dict()[name]), name
    assert_same(chosen.state_dict(), other.state_dict())


def test_states_of_eight_bits_and_a_table_that_all_share(tmp_path):
    table = torch.linspace(-1, 1, 256)
    one = {"state1": torch.arange(15, dtype=torch.uint8), "qmap1": table, "absmax1": torch.rand(2), "step": 3}
    tree = {
        "state": {0: one, 1: {**one, "nested": {"blocks": (1, table[3:])}}},
        "param_groups": [{"betas": (0.9, 0.95)}],
    }
    assert_same(tree, there_and_back(tmp_path, tree))


def test_random_numbers_go_on(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()

    random.gauss(0, 1), np.random.standard_normal()  # half of a pair is kept for the next call
    state = random_state(CPU)
    expected = draw()
    assert draw() != expected
    set_random_state(there_and_back(tmp_path, state), CPU)
    assert draw() == expected
    assert_same(state, there_and_back(tmp_path, state))


@pytest.mark.parametrize(
    "thing",
    [object(), {1, 2}, 1j, {(1, 2): 3}, {"1": 0, 1: 0}, np.array([object()]), [len]],
    ids=["object", "set", "complex", "tuple as a key", "keys that are one as text", "array of objects", "function"],
)
def test_what_would_need_a_pickle_is_refused_by_place(tmp_path, thing):
    with pytest.raises(ValueError, match=r"state\.inner.* cannot hold without pickling"):
        save_tree(tmp_path, "state", {"inner": thing})


def test_files_are_readable_and_no_pickle(tmp_path):
    save_tree(tmp_path, "state", {"lr": 0.1, "t": torch.ones(2)})
    assert json.loads((tmp_path / "state.json").read_text())["lr"] == 0.1
    assert has_tree(tmp_path, "state") and not has_tree(tmp_path, "other")
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(ValueError, match="does not fit its tensors"):
        load_tree(tmp_path, "state")
    with pytest.raises(ValueError, match="There is no"):
        load_tree(tmp_path, "other")
