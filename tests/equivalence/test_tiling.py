"""MLPs in tiles give what they gave whole: values, every gradient, and without repeating more than one product."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from oprd.states import tile_mlps
from oprd.states.tiling import _Tiled

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(kind=Qwen2Config, *, checkpointing=True, dtype=None, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SHAPE, **settings}), dtype=dtype or torch.float32).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def update(model, rows=2):
    torch.manual_seed(1)
    model.zero_grad()
    ids = torch.randint(0, 97, (rows, 37))
    states = model.base_model(input_ids=ids, use_cache=False)
    states = getattr(states, "last_hidden_state", None) if hasattr(states, "last_hidden_state") else states.logits
    loss = states.float().pow(3).sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
def test_values_and_gradients(kind, rows, checkpointing, monkeypatch):
    model = build(kind, checkpointing=checkpointing)
    expected = update(model, rows)
    used = []
    monkeypatch.setattr(_Tiled, "apply", lambda *a, f=_Tiled.apply: used.append(1) or f(*a))
    assert tile_mlps(model, 10, with_gradient=True) == 3
    check_same(update(model, rows), expected, rtol=1e-4, atol=1e-4)
    assert len(used) >= 3


def test_under_autocast():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        expected = update(model)
    tile_mlps(model, 10, with_gradient=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = update(model)
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.cosine_similarity(found[1][name].flatten(), gradient.flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["q_proj"], "all-linear"])
def test_adapters(targets, checkpointing):
    """Also where the first MLP's input has no gradient of its own."""
    model = get_peft_model(build(checkpointing=False), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    expected = update(model)
    tile_mlps(model, 10, with_gradient=True)
    check_same(update(model), expected, rtol=1e-3, atol=1e-3)


def test_frozen_parts():
    model = build(checkpointing=False).requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    expected = update(model)
    tile_mlps(model, 10, with_gradient=True)
    check_same(update(model), expected, rtol=1e-4, atol=1e-4)


def test_only_one_more_product_is_computed():
    """Whole: forward, and the recomputation stops short of the last product. In tiles that one is repeated, no other."""
    counts = {}

    def count(name):
        return lambda module, args, output: counts.__setitem__(name, counts.get(name, 0) + args[0].shape[:-1].numel())

    model = build()
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(block.mlp, name).register_forward_hook(count(name))
    tokens = 3 * 2 * 37
    update(model)
    assert counts == {"gate_proj": 2 * tokens, "up_proj": 2 * tokens, "down_proj": tokens}
    counts.clear()
    tile_mlps(model, 10, with_gradient=True)
    update(model)
    assert counts == {"gate_proj": 2 * tokens, "up_proj": 2 * tokens, "down_proj": 2 * tokens}


def test_without_gradient_tiles_are_free_and_always_on():
    model = build().eval()
    widths = []
    ids = torch.randint(0, 97, (2, 37))
    with torch.no_grad():
        expected = model.base_model(input_ids=ids).last_hidden_state
        tile_mlps(model, 10)
        model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, a, o: widths.append(o.shape[:2].numel()))
        found = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert widths == [10] * 7 + [4]
    widths.clear()
    update(model.train())
    assert set(widths) == {74}  # with gradient only when asked


def test_what_is_no_plain_mlp_stays():
    assert tile_mlps(build(MixtralConfig, num_local_experts=2)) == 0
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).train()
    tile_mlps(gpt2, 10, with_gradient=True)
    widths = []
    gpt2.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, a, o: widths.append(o.shape[:2].numel()))
    gpt2(input_ids=torch.randint(0, 97, (2, 37)), use_cache=False).logits.sum().backward()
    assert widths == [74]  # it drops out, which would differ when run again


def test_tiling_again_changes_the_tile():
    model = build()
    expected = update(model)
    for tokens in (10, 7):
        tile_mlps(model, tokens, with_gradient=True)
    check_same(update(model), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_sums_in_float32():
    """Many tiles of one token: bf16 sums of their gradients would drift."""
    model = build(dtype=torch.bfloat16)
    expected = update(model)[1]
    tile_mlps(model, 1, with_gradient=True)
    found = update(model)[1]
    for name, gradient in expected.items():
        assert torch.cosine_similarity(found[name].float().flatten(), gradient.float().flatten(), dim=0) > 0.999, name
