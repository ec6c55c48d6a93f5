"""Counted bytes are exact, on real tensors and on fake ones."""

import gc

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from oprd.insight.live_bytes import LiveBytes

KB = 1024  # float32 [256]


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    if request.param == "real":
        yield
    else:
        with FakeTensorMode():
            yield


def ones(*shape, **kwargs):
    return torch.ones(*(shape or (256,)), **kwargs)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x + x
        y = y + 0  # two at a time
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad + grad


@torch.library.custom_op("oprd_tests::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    wide = x.repeat(4)
    return wide[: len(x)] * 3


@thrice.register_fake
def _(x):
    return torch.empty_like(x)


def test_allocations_add_and_freed_ones_subtract(tensors):
    with LiveBytes() as memory:
        first = ones()
        second = ones(512)
        assert memory.live == 3 * KB
        del second
        assert memory.live == KB
        third = ones()
        assert memory.live == 2 * KB
    assert (memory.live, memory.peak) == (2 * KB, 3 * KB)
    del first, third
    assert memory.live == 2 * KB  # it stands still after exit


def test_what_existed_before_does_not_count(tensors):
    old = ones()
    with LiveBytes() as memory:
        old.add_(1)
        view = old[3:].view(-1, 11)
        assert memory.live == 0
        new = view + 1
        assert memory.live == 253 * 4
        del old, view
        assert memory.live == 253 * 4
    del new


def test_views_and_aliases_count_once(tensors):
    with LiveBytes() as memory:
        whole = ones(4, 64)
        parts = whole.unbind(0)
        alias = whole.detach().t()
        assert memory.live == KB
        del whole, parts
        assert memory.live == KB  # the alias holds it
        del alias
        assert memory.live == 0


def test_in_place_growth(tensors):
    old = ones()
    with LiveBytes() as memory:
        own = torch.empty(0)
        own.resize_(256)
        assert memory.live == KB
        own.resize_(1024)
        assert memory.live == 4 * KB
        old.resize_(512)
        assert memory.live == 5 * KB  # only what it grew by
        own.resize_(16)
        assert memory.live == 5 * KB  # resize_ keeps the memory


def test_out_argument_that_grows():
    with LiveBytes() as memory:
        out = torch.empty(0)
        torch.cat([ones(), ones()], out=out)
        assert memory.live == 2 * KB


def test_python_data_counts():
    with LiveBytes() as memory:
        values = torch.tensor([1.0] * 256)
        assert memory.live == KB
        del values
        assert memory.live == 0


def test_autograd_holds_what_it_saved(tensors):
    weight = ones(requires_grad=True)
    with LiveBytes() as memory:
        hidden = weight.exp()
        loss = hidden.sum()
        del hidden
        assert memory.live == KB + 4  # saved by exp, and the loss
        loss.backward()
        del loss
        assert memory.live == KB  # the gradient
    assert weight.grad is not None


def test_backward_allocations_count(tensors):
    weight = ones(requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    with LiveBytes() as memory:
        Doubled.apply(weight).sum().backward()
    # the scalar and its gradient aside: forward holds two at a time; backward makes one, and adds it in place
    assert memory.live == 0
    assert memory.peak == 2 * KB


def test_inside_custom_operators():
    weight = ones(requires_grad=True)
    with LiveBytes() as memory, torch.no_grad():
        result = thrice(weight)
        assert memory.live == KB
        assert memory.peak == 5 * KB  # the repetition and the result
        assert torch.equal(result, torch.full((256,), 3.0))
    with FakeTensorMode(), LiveBytes() as memory:
        result = thrice(ones())
        assert memory.live == KB and memory.peak == 2 * KB  # argument and result; the inside cannot be seen


def test_inside_of_composites_in_inference_mode():
    with torch.inference_mode(), LiveBytes() as memory:
        normalised = torch.nn.functional.rms_norm(ones(4, 64), (64,))
        assert memory.live == KB
        assert memory.peak > 2 * KB
    del normalised


def test_addresses_that_come_again_are_new():
    with LiveBytes() as memory:
        for size in range(1, 200):
            tensor = torch.empty(size)
            assert memory.live == 4 * size
            del tensor
            assert memory.live == 0
        assert memory.peak == 4 * 199


def test_entering_again_starts_afresh():
    memory = LiveBytes()
    for _ in range(2):
        with memory:
            kept = ones()
        assert memory.live == memory.peak == KB
        del kept


def test_table_of_the_peak(tensors):
    with LiveBytes() as memory:
        kept = [ones(), ones()]
        short = ones(512)
        product = kept[0] * kept[1]
        del short
        later = ones(64)
        del later
    held = memory.at_peak()
    assert [(h.bytes, h.count, h.shape) for h in held] == [(2 * KB, 2, (256,)), (2 * KB, 1, (512,)), (KB, 1, (256,))]
    assert held[2].where == "aten.mul.Tensor"
    assert sum(h.bytes for h in held) == memory.peak == 5 * KB
    assert "aten.mul.Tensor" in memory.table()
    del product


def test_table_with_stacks_names_the_line():
    with LiveBytes(stacks=True) as memory:
        kept = ones()
    assert "test_live_bytes.py:" in memory.at_peak()[0].where
    del kept


def test_table_adds_up_when_the_peak_moves():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 500, (300,), generator=generator).tolist()
    alive, total, most = [], 0, 0
    with LiveBytes() as memory:
        for size in sizes:
            alive.append(torch.empty(size))
            total += 4 * size
            most = max(most, total)
            if size % 3:
                gone = alive.pop(size % len(alive))
                total -= gone.nbytes
                del gone
        assert (memory.live, memory.peak) == (total, most)
        assert sum(held.bytes for held in memory.at_peak(1000)) == most


def test_checkpointing_lowers_the_peak(tensors):
    def block(x):
        for _ in range(8):
            x = x.sin()
        return x

    def step(run):
        x = ones(requires_grad=True)
        x.grad = torch.zeros_like(x)
        with LiveBytes() as memory:
            for _ in range(4):
                x = run(x)
            x.sum().backward()
        return memory.peak

    plain = step(block)
    saved = step(lambda x: checkpoint(block, x, use_reentrant=False))
    assert saved < plain / 2


def qwen_step():
    """One training step of a tiny Qwen2, gradient checkpointing on, counted.

    Eager attention: for SDPA transformers drops a mask only after looking at its values, which fake tensors lack."""
    config = transformers.Qwen2Config(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros(2, 64, dtype=torch.long)
    with LiveBytes() as memory:
        logits = model(input_ids=ids, use_cache=False).logits
        logits.float().log_softmax(-1)[..., 0].mean().backward()
        del logits
    gc.collect()
    return memory


def test_fake_equals_real_for_a_training_step():
    real = qwen_step()
    with FakeTensorMode():
        fake = qwen_step()
    assert fake.peak == real.peak > 0
    assert {(h.bytes, h.count, h.shape) for h in fake.at_peak(99)} == {
        (h.bytes, h.count, h.shape) for h in real.at_peak(99)
    }
