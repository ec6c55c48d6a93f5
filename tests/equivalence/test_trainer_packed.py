"""Training in packed micro-batches is training: the same losses, metrics and weights as with padded rows."""

import math

import pytest
import torch
from datasets import Dataset
from trl import DistillationTrainer

from oprd.training import microbatches
from oprd.training.bridging import rollout_settings
from oprd.training.solved_head import solve_head
from oprd.training.teacher import Offloaded
from tiny import PROMPTS, WIDE, canned_trainer, logged, merged_tokenizer, random_bridge, tiny_model

LEAST = 12 + 10  # the longest prompt and max_completion_length
OBJECTIVES = {
    "default": {},
    "last-k, token, own head": {"positions": "last_k", "position_k": 3, "lm_head": "keep", "reduction": "token"},
    "low layers": {"layers": [1, 2], "lm_head": "keep", "logit_weight": 0},
    "composite": {"output_loss": "full", "layers": [1, 3], "answers": ["7", None] * 8},
    "top-k": {"representation_weight": 0, "output_loss": "top_k", "lm_head": "keep"},
    "at the token": {"state_at": "token", "positions": "first_k", "position_k": 2},
}
OFF = (
    "time/",
    "tokens_per_second",
    "step_time",
    "train_",
    "memory/",
    "epoch",
    "eval_runtime",
    "eval_samples",
    "eval_steps",
)


def trained(tmp_path, **settings):
    trainer = canned_trainer(tmp_path, **settings)
    backwards = []
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **kwargs: (backwards.append(loss.detach()), backward(loss, **kwargs))
    trainer.train()
    return trainer, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, backwards


def records(trainer):
    """Everything logged but times."""
    return [{k: v for k, v in entry.items() if not k.startswith(OFF)} for entry in trainer.state.log_history]


def assert_same(ours, twin, atol=2e-6):
    for name, weight in twin[1].items():
        torch.testing.assert_close(ours[1][name], weight, atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert len(records(ours[0])) == len(records(twin[0]))
    for mine, other in zip(records(ours[0]), records(twin[0]), strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert mine[key] == pytest.approx(value, rel=2e-4, abs=2e-4 if "grad" not in key else 2e-3), key


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_budgets_and_accumulation_do_not_matter(tmp_path, objective):
    settings = OBJECTIVES[objective]
    whole = trained(tmp_path, **settings)
    start = dict(tiny_model(seed=0).named_parameters())
    assert max((whole[1][n] - start[n]).abs().max().item() for n in start if "lm_head" not in n) > 1e-3
    assert len(whole[2]) == 2  # one backward a step
    passes = {}
    for accumulation, budget in ((1, LEAST), (2, LEAST), (2, 10_000)):
        packed = trained(
            tmp_path,
            max_tokens_per_microbatch=budget,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        assert_same(packed, whole)
        passes[accumulation, budget] = len(packed[2])
    assert passes[2, 10_000] == 4
    assert passes[1, LEAST] > 4
    assert passes[2, LEAST] > 4
    if objective == "composite":
        assert len(logged(packed[0], "accuracy")) == 2


@pytest.mark.parametrize("budget", [LEAST, 40, 10_000])
def test_evaluation_keeps_to_the_budget_and_to_the_loss(tmp_path, monkeypatch, budget):
    settings = {"output_loss": "top_k", "per_device_eval_batch_size": 4}
    rows = Dataset.from_dict({"prompt": PROMPTS[:10]})  # the last batch has 2
    twin = canned_trainer(tmp_path, **settings)
    expected = twin.evaluate(rows)
    trainer = canned_trainer(tmp_path, max_tokens_per_microbatch=budget, **settings)
    sizes = []
    of_part = trainer._micro_batch_loss

    def watched(model, part):
        sizes.append(int(microbatches.lengths_of(part).sum()))
        assert isinstance(part, microbatches.MicroBatch)
        return of_part(model, part)

    monkeypatch.setattr(trainer, "_micro_batch_loss", watched)
    found = trainer.evaluate(rows)
    assert found.keys() == expected.keys()
    for key in found:
        if not key.startswith(OFF):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    assert max(sizes) <= budget
    assert len(sizes) == 3 if budget == 10_000 else len(sizes) > 3
    assert trainer._meters["train"].read(trainer.accelerator, 1) == {}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "packed", [{}, {"max_tokens_per_microbatch": 30, "gradient_scope": "suffix"}], ids=["", "packed"]
)
def test_where_things_wait_changes_nothing(tmp_path, tied, packed):
    def models():
        return {"model": tiny_model(seed=0, tied=tied), "teacher": tiny_model(seed=1, tied=tied)}

    objective = {"output_loss": "full", **packed}
    twin = trained(tmp_path, **models(), **objective)
    ours = trained(tmp_path, **models(), **objective, offload_teacher=True, offload_targets=True)
    assert all(ours[1][name].equal(weight) for name, weight in twin[1].items())
    assert records(ours[0]) == records(twin[0])
    teacher = dict(tiny_model(seed=1, tied=tied).named_parameters())
    assert all(p.equal(teacher[n]) for n, p in ours[0].teacher_model.named_parameters())


def test_the_teacher_is_at_hand_wherever_it_is_read(tmp_path, monkeypatch):
    """In training, in evaluation and for a solved head; in between its weights are of no use here."""

    def leave(self):
        for tensor in self._tensors:
            tensor.data = torch.full_like(tensor, float("nan"))

    monkeypatch.setattr(Offloaded, "_leave", leave)
    outcomes = []
    for offload in (False, True):
        trainer = canned_trainer(
            tmp_path,
            teacher=tiny_model(seed=1, **WIDE),
            trainer_kwargs={"bridge": random_bridge()},
            lm_head="solved",
            offload_teacher=offload,
        )
        trainer.train()
        found = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:8]}))
        explained = solve_head(trainer, prompts=8)
        weights = {n: p.detach() for n, p in trainer.model.named_parameters()}
        outcomes.append((found["eval_loss"], explained, weights))
    assert trainer.teacher_model.model.layers[0].mlp.up_proj.weight.isnan().all()
    assert outcomes[0][:2] == outcomes[1][:2]
    assert all(outcomes[1][2][name].equal(weight) for name, weight in outcomes[0][2].items())


@pytest.mark.parametrize("settings", [{"max_tokens_per_microbatch": 30}, {"gradient_scope": "suffix"}], ids=str)
def test_a_bridge_is_fitted_to_rows_that_stay_where_they_are(tmp_path, settings):
    """Held-out rows are known by their place, so rollouts for a fit are not dealt out again."""
    args = canned_trainer(tmp_path, offload_teacher=True, **settings).args
    fit = rollout_settings(args)
    assert args.is_packed
    assert not fit.is_packed
    assert args.offload_teacher
    assert not fit.offload_teacher


def with_lora():
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"positions": "last_k", "position_k": 2, "logit_weight": 0, "layers": [1]},
        {"output_loss": "sampled", "gradient_checkpointing": True},
        {"logit_weight": 0.5, "state_at": "token"},
    ],
    ids=str,
)
def test_suffix_trains(tmp_path, settings):
    """The first step has the value of the full gradient and another direction; micro-batches do not matter."""
    settings = {"gradient_scope": "suffix", **settings}
    suffix = trained(tmp_path, max_tokens_per_microbatch=LEAST, **settings)
    full = trained(tmp_path, **settings | {"gradient_scope": "full"})
    assert logged(suffix[0])[0] == pytest.approx(logged(full[0])[0], rel=1e-5, abs=1e-7)
    assert max((suffix[1][n] - full[1][n]).abs().max().item() for n in full[1]) > 1e-5
    one = trained(tmp_path, **settings)
    assert_same(suffix, one)
    start = dict(tiny_model(seed=0).named_parameters())
    assert max((suffix[1][n] - start[n]).abs().max().item() for n in start if "lm_head" not in n) > 1e-3


@pytest.mark.parametrize("scope", ["full", "suffix"])
def test_lora(tmp_path, scope):
    settings = {"gradient_scope": scope, "gradient_checkpointing": True}
    outcomes = []
    for budget in (None, LEAST):
        torch.manual_seed(5)
        outcomes.append(trained(tmp_path, max_tokens_per_microbatch=budget, trainer_kwargs=with_lora(), **settings))
    assert_same(outcomes[1], outcomes[0])
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in outcomes[0][1].items())


@pytest.mark.parametrize("scope", ["full", "suffix"])
def test_a_bridge_and_another_tokenizer(tmp_path, scope):
    tokenizer = merged_tokenizer()
    outcomes = []
    for budget in (None, LEAST):
        teacher = tiny_model(seed=1, vocab_size=len(tokenizer), **WIDE)
        teacher.generation_config.eos_token_id = tokenizer.eos_token_id
        outcomes.append(
            trained(
                tmp_path,
                teacher=teacher,
                trainer_kwargs={"teacher_processing_class": tokenizer, "bridge": random_bridge()},
                max_tokens_per_microbatch=budget,
                gradient_scope=scope,
                output_loss="top_k",
            )
        )
    assert_same(outcomes[1], outcomes[0], atol=1e-5)


def test_adaptive_optimisers_and_clipping_see_the_whole_step(tmp_path):
    """Clipping by the norm of the whole step's gradient, momentum once a step."""
    settings = {"optim": "adamw_torch", "max_grad_norm": 0.1, "max_steps": 4, "learning_rate": 1e-3}
    whole = trained(tmp_path, **settings)
    packed = trained(
        tmp_path,
        max_tokens_per_microbatch=LEAST,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **settings,
    )
    assert_same(packed, whole, atol=2e-5)
    assert packed[0].state.global_step == 4


def test_rollouts_are_drawn_once_a_step(tmp_path, monkeypatch):
    trainer = canned_trainer(
        tmp_path, max_tokens_per_microbatch=LEAST, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    drawn = []
    generate = trainer._generate_and_score_completions
    monkeypatch.setattr(
        trainer, "_generate_and_score_completions", lambda rows: (drawn.append(len(rows)), generate(rows))[1]
    )
    trainer.train()
    assert drawn == [8, 8]
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in logged(trainer, "time/student"))


class OneOfTwo:
    """An accelerator whose other process has ``others`` micro-batches."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, others):
        self.others = others

    def gather(self, count):
        return torch.cat([count, torch.tensor([self.others])])


@pytest.mark.parametrize("others", [1, 3, 4, 6])
def test_a_process_has_as_many_micro_batches_as_the_others(tmp_path, others):
    """Beyond its rows they weigh nothing: the loss is the same, and there is a gradient for the others to wait for."""
    trainer = canned_trainer(tmp_path, gradient_scope="suffix", output_loss="full")
    batch = trainer._generate_and_score_completions([{"prompt": text} for text in PROMPTS[:4]])
    whole = trainer.compute_loss(trainer.model, dict(batch))
    parts = microbatches.cut(batch, 20, OneOfTwo(others))
    assert len(parts) == max(others, len(microbatches.cut(batch, 20, trainer.accelerator)))
    losses = [trainer.compute_loss(trainer.model, part) for part in parts]
    torch.testing.assert_close(sum(losses), whole)
    idle = [part for part in parts if not (part["state_weights"].any() or part["output_weights"].any())]
    assert len(idle) == max(0, others - 4)
    for loss in losses:
        trainer.model.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
    for part in parts:  # nothing is sampled again
        assert trainer._prepare_inputs(part) is part


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    settings = {
        "max_tokens_per_microbatch": 30,
        "max_steps": 4,
        "optim": "adamw_torch",
        "gradient_accumulation_steps": 2,
    }
    settings |= {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", **settings)
    again = canned_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in again.model.named_parameters():
        assert weight.equal(whole[1][name]), name
    assert logged(again) == logged(whole[0])
    assert "oprd_packed" not in (tmp_path / "whole" / "checkpoint-2" / "config.json").read_text()


def test_a_budget_too_small_for_a_row_is_an_error_before_a_model_is_loaded(tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DistillationTrainer, "__init__", load)
    told = r"row 12: a prompt of 12 tokens and a response of 10 .*\(1 such rows\)\. Set it to at least 22"
    with pytest.raises(ValueError, match=told):
        canned_trainer(tmp_path, max_tokens_per_microbatch=LEAST - 1)
    with pytest.raises(AssertionError):
        canned_trainer(tmp_path, max_tokens_per_microbatch=LEAST)


def test_models_that_cannot_are_refused_before_training(tmp_path):
    for role, told in (("model", "'eager'"), ("teacher", "'eager'")):
        eager = tiny_model(seed=2)
        eager.set_attn_implementation("eager")
        for settings in ({"max_tokens_per_microbatch": 30}, {"gradient_scope": "suffix"}):
            with pytest.raises(ValueError, match=told):
                canned_trainer(tmp_path, **{role: eager}, **settings)
        canned_trainer(tmp_path, **{role: eager})
