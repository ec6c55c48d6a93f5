"""The closed-form head against least squares on plain forwards, and when it is taken."""

import pytest
import torch

from oprd.training.solved_head import solve_head
from tiny import (
    PROMPTS,
    WIDE,
    canned_completion,
    canned_trainer,
    random_bridge,
    reference_states,
    tiny_model,
    tiny_tokenizer,
)


def bridged(tmp_path, teacher=None, model=None, **settings):
    return canned_trainer(
        tmp_path,
        model=model,
        teacher=teacher or tiny_model(seed=1, **WIDE),
        trainer_kwargs={"bridge": random_bridge()},
        **settings,
    )


def test_the_solved_head_is_the_least_squares_one(tmp_path):
    trainer = bridged(tmp_path)
    assert trainer.lm_head == "solved"
    trainer.train()
    student, teacher = trainer.model, trainer.teacher_model
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    own, other = [], []
    for prompt in PROMPTS:
        ids = tiny_tokenizer()(prompt)["input_ids"]
        row = torch.tensor(ids + canned_completion(ids))
        places = slice(len(ids) - 1, len(row) - 1)  # the states that predict the response
        with torch.no_grad():
            own.append(reference_states(student, row)[-1, places])
            other.append(reference_states(teacher, row)[-1, places])
    own, other = torch.cat(own).double(), torch.cat(other).double()
    linear = torch.linalg.lstsq(own, other).solution.T
    share = solve_head(trainer, prompts=len(PROMPTS))
    torch.testing.assert_close(
        student.lm_head.weight.double(), teacher.lm_head.weight.double() @ linear, atol=1e-3, rtol=1e-3
    )
    assert share == pytest.approx(1 - ((other - own @ linear.T).pow(2).sum() / other.pow(2).sum()).item(), abs=1e-3)
    changed = {n for n, p in student.named_parameters() if not p.equal(before[n])}
    assert changed == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({}, "solved"),
        ({"lm_head": "keep"}, "keep"),
        ({"output_loss": "full"}, "keep"),
        ({"lm_head": "solved", "output_loss": "full"}, "solved"),
    ],
    ids=str,
)
def test_when_it_is_taken(tmp_path, settings, taken):
    assert bridged(tmp_path, **settings).lm_head == taken


def test_when_it_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="there is none"):
        canned_trainer(tmp_path, lm_head="solved")
    tied = tiny_model(tied=True)
    with pytest.raises(ValueError, match="solved cannot be: the student ties its head"):
        bridged(tmp_path, model=tied, lm_head="solved")
    assert bridged(tmp_path, model=tiny_model(tied=True)).lm_head == "keep"
    capped = tiny_model("gemma2", seed=1, **WIDE)
    with pytest.raises(ValueError, match="teacher's head is not one plain matrix"):
        bridged(tmp_path, teacher=capped, lm_head="solved")


def test_a_run_ends_with_it(tmp_path):
    """Through the command: the final model's head is solved, the recipe says nothing of it."""
    from transformers import AutoModelForCausalLM

    from oprd.cli import main
    from oprd.models import resolve_path

    arguments = ["train", "--config", "miniature-bridge", "--max_steps", "2", "--bridge_prompts", "40", "--output_dir"]
    assert main([*arguments, str(tmp_path / "run")]) == 0
    heads = [
        AutoModelForCausalLM.from_pretrained(path).lm_head.weight
        for path in (tmp_path / "run" / "final", resolve_path("miniature:student"))
    ]
    assert (heads[0] - heads[1]).norm() > 0.1 * heads[1].norm()
