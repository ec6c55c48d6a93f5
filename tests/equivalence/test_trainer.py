"""Settings that must train alike, trained alike: the same rollouts through `OPRDTrainer`, weights compared."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tiny import PROMPTS, canned_completion, canned_trainer, logged, tiny_batch, tiny_model, tiny_tokenizer

OBJECTIVES = {
    "default": {},
    "with the head metric": {"logit_weight": 1.0},
    "last-k, own head": {"logit_weight": 0, "lm_head": "keep", "positions": "last_k", "position_k": 3},
    "token reduction": {"reduction": "token", "logit_weight": 0.5},
    "top-k": {"representation_weight": 0, "logit_weight": 0, "output_loss": "top_k", "lm_head": "keep"},
    "composite": {"output_loss": "full", "representation_weight": 10.0, "layers": [1, 3]},
}


def trained(tmp_path, **settings):
    trainer = canned_trainer(tmp_path, **settings)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return trainer, weights


def assert_alike(ours, twin, atol=2e-6):
    for name, weight in twin.items():
        torch.testing.assert_close(ours[name], weight, atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulation_and_checkpointing(tmp_path, objective):
    """8 x 1, 2 x 4 and 1 x 8 (micro-batches x size) take the same steps; so does gradient checkpointing."""
    settings = OBJECTIVES[objective]
    whole, weights = trained(tmp_path, **settings)
    start = dict(tiny_model(seed=0).named_parameters())
    moved = max((weights[n] - start[n]).abs().max().item() for n in weights if "lm_head" not in n)
    assert moved > 1e-3  # far above the tolerance: a missing gradient would show
    for size, checkpointing in ((4, False), (1, False), (8, True)):
        split, split_weights = trained(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            gradient_checkpointing=checkpointing,
            **settings,
        )
        assert_alike(split_weights, weights)
        for key in ("loss", "loss/representation", "loss/logit", "loss/output", "cosine", "entropy/student"):
            assert logged(split, key) == pytest.approx(logged(whole, key), abs=2e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_side_and_row_order(tmp_path, objective):
    """The loss and gradient of one batch, padded on either side and in any order."""
    trainer = canned_trainer(tmp_path, **OBJECTIVES[objective])
    outcomes = []
    for padding, order in (("left", [0, 1, 2, 3]), ("right", [0, 1, 2, 3]), ("left", [2, 0, 3, 1])):
        batch = {name: value[order] for name, value in tiny_batch(padding=padding).items()}
        weights = torch.rand(4, 7, generator=torch.Generator().manual_seed(3))[order] * batch["completion_mask"]
        inputs = {**batch, "state_weights": weights, "output_weights": weights}
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        outcomes.append((loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}))
    for loss, gradients in outcomes[1:]:
        torch.testing.assert_close(loss, outcomes[0][0])
        assert_alike(gradients, outcomes[0][1], atol=1e-5)


def minimal_loop():
    path = Path(__file__).parents[2] / "examples" / "minimal_loop.py"
    spec = importlib.util.spec_from_file_location("minimal_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("logit_weight", [0.0, 1.0])
def test_the_minimal_loop_is_the_trainer(tmp_path, logit_weight):
    """Same loss, same gradient, on one step's rollouts."""
    tokenizer = tiny_tokenizer()
    trainer = canned_trainer(tmp_path, max_steps=1, logit_weight=logit_weight)
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    student.lm_head.weight.data.copy_(teacher.lm_head.weight)
    prompts = tokenizer(PROMPTS[:8])["input_ids"]
    responses = [canned_completion(ids) for ids in prompts]
    loss = minimal_loop().oprd_loss(student, teacher, prompts, responses, 0, logit_weight)
    loss.backward()
    trainer.train()
    assert logged(trainer) == pytest.approx([loss.item()], rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        own = dict(student.named_parameters())[name]
        if own.grad is None or (logit_weight == 0 and "lm_head" in name):
            assert parameter.equal(own)
            continue
        torch.testing.assert_close(parameter, own - 1e-2 * own.grad, atol=2e-6, rtol=1e-4)


def test_several_responses_per_prompt_share_a_step(tmp_path):
    trainer = canned_trainer(tmp_path, responses_per_prompt=4)
    sampled = list(trainer._get_train_sampler())
    assert sampled[:8] == [0, 0, 0, 0, 1, 1, 1, 1]
    trainer.train()
    assert len(logged(trainer)) == 2
