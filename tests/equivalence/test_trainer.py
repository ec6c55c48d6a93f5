"""Settings that must train alike, trained alike: the same rollouts through `OPRDTrainer`, weights compared."""

import importlib.util
from pathlib import Path

import pytest
import torch
from trl import DistillationTrainer

from tiny import (
    PROMPTS,
    canned_completion,
    canned_trainer,
    logged,
    reference_states,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)

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


BY_HAND = {
    "defaults": {},
    "last_k": {"positions": "last_k", "position_k": 2},
    "first_k, token": {"positions": "first_k", "position_k": 2, "reduction": "token"},
    "token": {"reduction": "token"},
    "states at the token": {"state_at": "token", "layers": [2]},
    "holes (a tool's answer)": {"positions": "last_k", "position_k": 2, "hole": True},
}


@pytest.mark.parametrize("case", BY_HAND)
def test_the_logged_loss_by_hand(tmp_path, monkeypatch, case):
    """Eq. 6 over the canned rollouts, one unpadded row, layer and position at a time."""
    settings = dict(BY_HAND[case])
    hole = settings.pop("hole", False)
    if hole:
        generate = DistillationTrainer._generate_and_score_completions

        def with_a_hole(self, inputs):
            batch = generate(self, inputs)
            mask = torch.ones_like(batch["completion_mask"])
            mask[:, 1] = 0  # the second token of every response came from a tool
            return batch | {"tool_mask": mask}

        monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", with_a_hole)
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    layers = settings.get("layers", [1, 2, 3])
    rows = []
    for prompt in tiny_tokenizer()(PROMPTS[:8])["input_ids"]:
        response = canned_completion(prompt)
        ids = torch.tensor(prompt + response)
        with torch.no_grad():
            gap = (reference_states(student, ids) - reference_states(teacher, ids)).pow(2).mean(-1)[layers].mean(0)
        where = [t for t in range(len(response)) if not (hole and t == 1)]
        k = settings.get("position_k")
        where = {"last_k": where[-k:], "first_k": where[:k]}.get(settings.get("positions"), where) if k else where
        shift = 0 if settings.get("state_at") == "token" else 1
        rows.append([gap[len(prompt) + t - shift].item() for t in where])
    if settings.get("reduction") == "token":
        expected = sum(map(sum, rows)) / sum(map(len, rows))
    else:
        expected = sum(sum(row) / len(row) for row in rows) / len(rows)
    trainer = canned_trainer(
        tmp_path, max_steps=1, logit_weight=0, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings
    )
    trainer.train()
    assert logged(trainer) == pytest.approx([expected], rel=1e-5)
    generated = sum(
        len(canned_completion(p)) - hole * (len(canned_completion(p)) > 1)
        for p in tiny_tokenizer()(PROMPTS[:8])["input_ids"]
    )
    assert logged(trainer, "response_tokens") == [generated]


def test_several_responses_per_prompt_share_a_step(tmp_path):
    trainer = canned_trainer(tmp_path, responses_per_prompt=4)
    sampled = list(trainer._get_train_sampler())
    assert sampled[:8] == [0, 0, 0, 0, 1, 1, 1, 1]
    trainer.train()
    assert len(logged(trainer)) == 2
