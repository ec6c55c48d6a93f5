"""Transitions, adaptive weights and attention maps through the trainer, against plain sums by hand."""

import pytest
import torch

import tiny
from oprd.objectives import RunningMean, layer_weights, representation_loss
from tiny import PROMPTS, canned_trainer, logged, reference_states, tiny_model, tiny_tokenizer

RATE, OWN = 1e-2, {"logit_weight": 0, "lm_head": "keep"}
PACKED = {"max_tokens_per_microbatch": 26}


def states_of(model, prompt, *, gradient=False):
    """``[L, T, d]``: the states that predict each response token, layers 1 to L."""
    ids = tiny_tokenizer()(prompt)["input_ids"]
    response = tiny.canned_completion(ids)
    with torch.set_grad_enabled(gradient):
        return reference_states(model, torch.tensor(ids + response))[1:, len(ids) - 1 : -1]


def padded(rows):
    """``[L, B, T, d]`` and the mask ``[B, T]``."""
    width = max(row.shape[1] for row in rows)
    mask = torch.stack([torch.arange(width) < row.shape[1] for row in rows])
    return torch.stack([torch.nn.functional.pad(r, (0, 0, 0, width - r.shape[1])) for r in rows], 1), mask


def assert_is(trainer, student, losses):
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, dict(student.named_parameters())[name], atol=3e-6, rtol=2e-4)


def by_hand(loss, steps=2):
    student, losses = tiny_model(seed=0), []
    for step in range(steps):
        student.zero_grad()
        value = loss(student, PROMPTS[8 * step : 8 * step + 8], step)
        value.backward()
        losses.append(value.item())
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
    return student, losses


@pytest.mark.parametrize("over", ["positions", "layers", "both"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize(
    "extra",
    [{}, PACKED, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}],
    ids=["padded", "packed", "accumulated"],
)
def test_transitions(tmp_path, monkeypatch, over, reduction, extra):
    """Also of responses of a single token, which have no change in them."""
    canned = tiny.canned_completion
    monkeypatch.setattr(tiny, "canned_completion", lambda ids: canned(ids)[: 1 if len(ids) == 1 else None])
    trainer = canned_trainer(
        tmp_path, representation_loss="transition", transition_over=over, reduction=reduction, **OWN, **extra
    )
    trainer.train()
    teacher = tiny_model(seed=1)

    def loss(student, prompts, _):
        own, mask = padded([states_of(student, p, gradient=True) for p in prompts])
        other, _ = padded([states_of(teacher, p) for p in prompts])
        return representation_loss(own, other, mask, kind="transition", transition_over=over, reduction=reduction)

    assert_is(trainer, *by_hand(loss))
    assert -1 < logged(trainer, "transition_cosine")[0] < 1


def test_transitions_do_not_see_a_constant_offset(tmp_path):
    """A teacher whose embeddings carry one more vector everywhere: points are far apart, directions of change are the same."""

    def run(folder, kind, moved):
        teacher = tiny_model(seed=0)
        offset = 5 * torch.randn(16, generator=torch.Generator().manual_seed(3))
        if moved:
            for block in teacher.model.layers[:2]:
                block.register_forward_hook(lambda module, args, output: output + offset)
        settings = {"transition_over": "positions"} if kind == "transition" else {}
        trainer = canned_trainer(
            tmp_path / folder, teacher=teacher, representation_loss=kind, layers=[1], max_steps=1, **OWN, **settings
        )
        trainer.train()
        return logged(trainer)[0]

    assert run("a", "transition", True) == pytest.approx(0, abs=1e-5)
    assert run("b", "mse", True) > 1
    assert run("c", "mse", False) == pytest.approx(0, abs=1e-9)


WEIGHTINGS = {
    "teacher_rms": {"layer_weighting": "teacher_rms"},
    "adaptive layers": {"layer_weighting": "adaptive"},
    "adaptive positions": {"positions": "adaptive"},
    "both": {"layer_weighting": "adaptive", "positions": "adaptive"},
}


@pytest.mark.parametrize("case", WEIGHTINGS)
@pytest.mark.parametrize("extra", [{}, PACKED], ids=["padded", "packed"])
def test_weights_follow_the_means_of_the_updates_before(tmp_path, case, extra):
    settings = WEIGHTINGS[case]
    trainer = canned_trainer(tmp_path, **settings, **OWN, **extra)
    trainer.train()
    teacher = tiny_model(seed=1)
    means = {"distance": RunningMean.empty(3), "power": RunningMean.empty(3)}

    def loss(student, prompts, step):
        rows = []
        sums = torch.zeros(2, 3)
        kind = settings.get("layer_weighting", "uniform")
        weights = layer_weights(kind, means["distance"].value, means["power"].value)
        count = 0
        for prompt in prompts:
            own, other = states_of(student, prompt, gradient=True), states_of(teacher, prompt)
            distance = (own - other).pow(2).mean(-1)  # [L, T]
            sums += torch.stack([distance.detach().sum(1), other.pow(2).mean(-1).sum(1)])
            count += own.shape[1]
            if settings.get("positions") == "adaptive" and step:
                focus = means["distance"].value.unsqueeze(1)
                distance = distance * (distance.detach() / focus).clamp(max=4)
            rows.append((weights.unsqueeze(1) * distance).mean())
        total = sum(rows) / len(rows)
        for name, of_layers in zip(means, sums, strict=True):
            means[name] = means[name].updated(of_layers, torch.tensor(float(count)))
        return total

    assert_is(trainer, *by_hand(loss))
    held = trainer.averages["means"].state_dict()
    torch.testing.assert_close(held["distance.sums"], means["distance"].sums, rtol=1e-4, atol=1e-5)


def test_a_run_with_means_goes_on_from_its_checkpoint(tmp_path):
    settings = {
        **WEIGHTINGS["both"],
        **OWN,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "num_train_epochs": 3,
    }
    whole = canned_trainer(tmp_path / "whole", **settings)
    whole.train()
    again = canned_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, parameter in whole.model.named_parameters():
        assert dict(again.model.named_parameters())[name].equal(parameter)
    other = canned_trainer(tmp_path / "other", **{**settings, "layers": [1, 2]})
    with pytest.raises(ValueError, match="running means are of other layers"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))


@pytest.mark.parametrize(
    "extra", [{}, PACKED, {"gradient_checkpointing": True}], ids=["padded", "packed", "checkpointed"]
)
def test_attention_maps(tmp_path, extra):
    """With as many keys as there are tokens: KL of whole rows of attention, as transformers gives them out."""
    settings = {"attention_weight": 2.0, "attention_layers": [1, 3], "attention_keys": 40}
    trainer = canned_trainer(tmp_path, **settings, **OWN, **extra)
    trainer.train()
    teacher = eager(tiny_model(seed=1))

    def loss(student, prompts, _):
        eager(student)
        rows, maps = [], []
        for prompt in prompts:
            rows.append((states_of(student, prompt, gradient=True) - states_of(teacher, prompt)).pow(2).mean())
            ids = tiny_tokenizer()(prompt)["input_ids"]
            text = torch.tensor([ids + tiny.canned_completion(ids)])
            own = student(text, output_attentions=True, use_cache=False).attentions
            with torch.no_grad():
                other = teacher(text, output_attentions=True, use_cache=False).attentions
            for layer in (0, 2):
                p, q = (x[layer][0, :, len(ids) - 1 : -1].clamp(min=1e-30) for x in (own, other))
                maps.append((q * (q.log() - p.log())).sum(-1).mean())
        return (sum(rows) + 2.0 * sum(maps) / 2) / len(prompts)

    assert logged(trainer) == pytest.approx(by_hand(loss)[1], rel=2e-3)  # maps are held in half precision
    assert logged(trainer, "loss/attention")[0] > 0


def eager(model):
    model.config._attn_implementation = "eager"
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher": {"layers": 3, "width": 16, "heads": 4}},
            "attention_weight needs a teacher of the student's family",
        ),
        ({"teacher_prompt_template": "a{prompt}"}, "that reads the same tokens"),
    ],
)
def test_maps_that_cannot_be_compared(tmp_path, settings, message):
    settings = dict(settings)
    shape = settings.pop("teacher", None)
    teacher = tiny_model(seed=1)
    if shape:
        teacher.config.num_attention_heads = 4
    with pytest.raises(ValueError, match=message):
        canned_trainer(tmp_path, teacher=teacher, attention_weight=1.0, **OWN, **settings)


def test_random_positions_are_drawn_anew(tmp_path):
    trainer = canned_trainer(tmp_path, positions="random_k", position_k=1, **OWN)
    rows = [{"prompt": prompt} for prompt in PROMPTS[:8]]
    torch.manual_seed(0)
    one, other = (trainer._generate_and_score_completions(rows)["state_weights"] > 0 for _ in range(2))
    assert one.sum(1).tolist() == other.sum(1).tolist() == [1] * 8
    assert not one.equal(other)
