"""Capture against transformers' own ``output_hidden_states=True``, values and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from oprd.models import backbone_of, causal_lm, decoder_layers
from oprd.states import visit_states
from oprd.states.views import close_gaps
from tiny import ARCHITECTURES, tiny_batch, tiny_model


def reading():
    batch = tiny_batch()
    return close_gaps(
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool(),
    )


def trainable_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_equal_output_hidden_states(architecture, adapter, checkpointing):
    model = tiny_model(architecture).train()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    text, layers = reading(), [1, 2, 3]
    weights = torch.randn(len(layers), *text.ids_BS.shape, 16)

    def head_must_not_run(*_):
        raise AssertionError("the LM head ran")

    guard = causal_lm(model).get_output_embeddings().register_forward_hook(head_must_not_run)
    visits = []

    def visit(layer, states):
        visits.append(layer)
        return (states * weights[layer - 1]).sum(), states.detach()

    last, results = visit_states(model, text, layers, visit)
    ours = trainable_gradients(model, sum(loss for loss, _ in results.values()))
    guard.remove()
    assert visits == layers  # once each, also where blocks are recomputed

    slow = model(input_ids=text.ids_BS, attention_mask=text.mask_BS.long(), output_hidden_states=True, use_cache=False)
    for layer, (_, states) in results.items():
        torch.testing.assert_close(states[text.mask_BS], slow.hidden_states[layer][text.mask_BS])
    torch.testing.assert_close(last, slow.hidden_states[-1])
    twin = trainable_gradients(
        model, sum((slow.hidden_states[i] * w).sum() for i, w in zip(layers, weights, strict=True))
    )
    twin = {name: g for name, g in twin.items() if "lm_head" not in name}
    assert ours.keys() >= twin.keys()
    for name, gradient in twin.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4)


def test_a_loss_built_in_the_forward_is_differentiated_layer_by_layer():
    """Backward reaches a layer's gather right before that layer: not all gathers first, each with a full-size gradient."""
    model, text = tiny_model().train(), reading()
    order = []

    def visit(layer, states):
        picked = states[:, -1]
        picked.register_hook(lambda _: order.append(f"loss {layer}"))
        return picked.pow(2).sum()

    for index, block in enumerate(decoder_layers(backbone_of(model)), 1):
        block.register_full_backward_hook(lambda *_, index=index: order.append(f"block {index}"))
    _, results = visit_states(model, text, [1, 2, 3], visit)
    sum(results.values()).backward()
    assert order == ["loss 3", "block 3", "loss 2", "block 2", "loss 1", "block 1"]


def test_hooks_are_gone_afterwards_and_after_an_error():
    model, text = tiny_model(), reading()
    visit_states(model, text, [1], lambda layer, states: None)
    with pytest.raises(ZeroDivisionError):
        visit_states(model, text, [1], lambda layer, states: 1 / 0)
    assert all(not block._forward_hooks for block in decoder_layers(backbone_of(model)))


def test_layers_outside_are_refused():
    with pytest.raises(ValueError, match=r"\[4\] are outside 1..3"):
        visit_states(tiny_model(), reading(), [1, 4], lambda layer, states: None)
