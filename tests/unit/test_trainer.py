"""What `OPRDTrainer` settles before the first step, and what it refuses."""

import pytest
import torch

from tiny import VOCAB, canned_trainer, logged, tiny_model, tiny_tokenizer

PLAIN = {"logit_weight": 0}
WITH_LOGITS = {"logit_weight": 1}


def test_padded_vocabulary_is_never_sampled_nor_supervised(tmp_path):
    student, teacher = tiny_model(seed=0, vocab_size=VOCAB + 3), tiny_model(seed=1, vocab_size=VOCAB + 8)
    trainer = canned_trainer(tmp_path, model=student, teacher=teacher, output_loss="full")
    assert trainer.generation_config.suppress_tokens == [VOCAB, VOCAB + 1, VOCAB + 2]
    start = student.lm_head.weight[VOCAB:].detach().clone()
    trainer.train()
    assert trainer.model.lm_head.weight[VOCAB:].equal(start)


def test_the_teacher_may_have_another_shape_without_the_state_loss(tmp_path):
    wide = tiny_model(seed=1, width=32, layers=2)
    with pytest.raises(ValueError, match=r"3 layers of width 16, the teacher 2 of width 32.*[Bb]ridge"):
        canned_trainer(tmp_path, teacher=wide)
    trainer = canned_trainer(tmp_path, teacher=wide, representation_weight=0, output_loss="top_k")
    assert trainer.lm_head == "keep"
    trainer.train()
    assert all(torch.isfinite(torch.tensor(logged(trainer))))
    assert logged(trainer, "cosine/layer_03") == []


def test_a_student_cannot_be_its_own_teacher_object(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="Pass a copy"):
        canned_trainer(tmp_path, model=model, teacher=model)


def test_settings_for_loading_a_teacher_that_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="would be ignored: the teacher is already a model"):
        canned_trainer(tmp_path, teacher_model_init_kwargs={"dtype": "float32"})


def test_too_few_prompts_for_a_step(tmp_path):
    with pytest.raises(ValueError, match="3 prompts and one step needs 8"):
        canned_trainer(tmp_path, prompts=["a", "b", "c"])


def test_evaluation_does_not_cost_the_next_step_its_time(tmp_path):
    from datasets import Dataset

    trainer = canned_trainer(tmp_path)
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["ab", "cd", "ef"]})
    trainer.args.eval_strategy = "steps"
    trainer.evaluate()
    trainer.train()
    assert min(logged(trainer, "time/student")) > 0
    assert trainer._stopwatches["eval"].seconds["teacher"] > 0


def test_a_missing_teacher_and_a_missing_prompt_column(tmp_path):
    from datasets import Dataset

    from oprd import OPRDConfig, OPRDTrainer

    args = OPRDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="teacher_model_name_or_path"):
        OPRDTrainer(model=tiny_model(), args=args, train_dataset=Dataset.from_dict({"prompt": ["a"]}))
    with pytest.raises(ValueError, match="no 'prompt' column; it has text"):
        OPRDTrainer(
            model=tiny_model(), teacher_model=tiny_model(), args=args, train_dataset=Dataset.from_dict({"text": ["a"]})
        )


def test_no_teacher_signal_leaves_the_student_where_it_is(tmp_path):
    """A student taught by itself has zero reward and zero distance: nothing moves."""
    for settings in (WITH_LOGITS, {"representation_weight": 0, "logit_weight": 0, "output_loss": "sampled"}):
        trainer = canned_trainer(tmp_path, teacher=tiny_model(seed=0), **settings)
        trainer.train()
        for name, start in tiny_model(seed=0).named_parameters():
            torch.testing.assert_close(dict(trainer.model.named_parameters())[name], start, atol=1e-6, rtol=0)


def test_graded_rollouts_are_logged(tmp_path):
    trainer = canned_trainer(tmp_path, answers=["5"] * 16)
    trainer.train()
    assert logged(trainer, "accuracy") == [0.0, 0.0]


def test_a_missing_answer_is_left_out_of_accuracy(tmp_path):
    trainer = canned_trainer(tmp_path, max_steps=1, answers=["5"] * 15 + [None], shuffle_dataset=False)
    trainer.train()
    assert logged(trainer, "accuracy") == [0.0]
    inputs = [{"prompt": "ab", "answer": None}, {"prompt": "xyz", "answer": "5"}]
    trainer._generate_and_score_completions(inputs)
    assert trainer._metrics["train"]["accuracy"] == [0.0]


def test_states_across_tokenizers_need_a_bridge(tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"different tokenizers.*'<new>' is None and 37.*oprd bridge fit"):
        canned_trainer(
            tmp_path, teacher=tiny_model(seed=1, vocab_size=38), trainer_kwargs={"teacher_processing_class": other}
        )


def test_a_teacher_that_ends_otherwise_is_refused(tmp_path):
    other = tiny_tokenizer()
    other.eos_token = "z"
    with pytest.raises(ValueError, match="would never stop"):
        canned_trainer(tmp_path, trainer_kwargs={"teacher_processing_class": other})
