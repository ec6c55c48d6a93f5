"""Whose LM head the student ends with, what trains it, and what is said about it."""

import logging

import pytest

from tiny import canned_trainer, logged, tiny_model

PLAIN = {"logit_weight": 0}
WITH_LOGITS = {"logit_weight": 1}


def head_of(trainer):
    return trainer.model.lm_head.weight


@pytest.mark.parametrize(
    ("lm_head", "settings", "adopted", "trained"),
    [
        ("teacher", {}, True, False),
        ("teacher", WITH_LOGITS, True, True),
        ("teacher", {"output_loss": "top_k"}, True, True),
        ("keep", {}, False, True),
        ("keep", PLAIN, False, False),
        ("freeze", WITH_LOGITS, False, False),
        ("auto", {}, True, False),
    ],
)
def test_heads(tmp_path, lm_head, settings, adopted, trained):
    student, teacher = tiny_model(seed=0), tiny_model(seed=1)
    start = {True: teacher, False: student}[adopted].lm_head.weight.detach().clone()
    trainer = canned_trainer(tmp_path, model=student, teacher=teacher, lm_head=lm_head, **settings)
    assert head_of(trainer).equal(start)
    trainer.train()
    assert head_of(trainer).equal(start) is not trained
    assert teacher.lm_head.weight.equal(tiny_model(seed=1).lm_head.weight)
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.0),
        ({"lm_head": "keep"}, 1.0),
        ({"lm_head": "freeze"}, 1.0),
        ({"lm_head": "keep", "output_loss": "sampled"}, 0.0),
        ({"lm_head": "keep", "output_loss": "sampled", "representation_weight": 0}, 0.0),
        ({"lm_head": "keep", "logit_weight": 0.25}, 0.25),
        ({"logit_weight": 2.0}, 2.0),
    ],
)
def test_an_open_logit_weight_trains_a_head_that_nothing_else_would(tmp_path, settings, expected):
    assert canned_trainer(tmp_path, **settings).objective.logit_weight == expected


def test_tied_heads(tmp_path):
    tied = {"model": tiny_model(seed=0, tied=True), "teacher": tiny_model(seed=1, tied=True)}
    trainer = canned_trainer(tmp_path, **tied)
    assert (trainer.lm_head, trainer.objective.logit_weight) == ("keep", 1.0)
    trainer.train()
    assert len(logged(trainer)) == 2
    with pytest.raises(ValueError, match=r"ties its head.*lm_head: keep"):
        canned_trainer(tmp_path, **tied, lm_head="teacher")
    with pytest.raises(ValueError, match="freeze the input embeddings"):
        canned_trainer(tmp_path, **tied, lm_head="freeze")


def test_what_was_done_with_the_head_is_said(tmp_path, caplog):
    # accelerate's logger speaks through the standard one
    with caplog.at_level(logging.INFO, logger="oprd.training"):
        canned_trainer(tmp_path, lm_head="keep", **PLAIN)
    text = caplog.text
    assert "the student's own (the teacher's differs by" in text
    assert "logit_weight 0." in text
    assert "592 parameters that no loss reaches are frozen" in text
    assert "may not move accuracy" in text


def test_soft_capped_logits_are_refused_before_anything_is_sampled(tmp_path):
    gemma = {"model": tiny_model("gemma2", tied=True), "teacher": tiny_model("gemma2", seed=1, tied=True)}
    with pytest.raises(ValueError, match="output_loss: full"):
        canned_trainer(tmp_path, **gemma)
    canned_trainer(tmp_path, **gemma, output_loss="full").train()


def test_lora_with_an_adopted_head_says_what_an_adapter_lacks(tmp_path, caplog):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from oprd.training.run import save_final

    lora = {"peft_config": LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"])}
    with caplog.at_level(logging.WARNING, logger="oprd.training"):
        trainer = canned_trainer(tmp_path, trainer_kwargs=lora)
    assert "an adapter saved alone does not carry" in caplog.text
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    save_final(trainer, tmp_path / "best", goes_on=True)
    after = trainer.model.state_dict()
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)
    save_final(trainer, tmp_path / "final")
    best, final = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("best", "final"))
    assert final.lm_head.weight.equal(tiny_model(seed=1).lm_head.weight)
    assert all(one.equal(other) for one, other in zip(best.parameters(), final.parameters(), strict=True))


def test_a_model_split_over_devices_is_refused(tmp_path):
    teacher = tiny_model(seed=1)
    teacher.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match=r"The teacher is split over several devices.*CUDA_VISIBLE_DEVICES"):
        canned_trainer(tmp_path, teacher=teacher)
