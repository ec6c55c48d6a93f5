"""`oprd plan`: from a recipe to a table, what it assumes, and what it says when a recipe does not fit."""

import json

import pytest
import yaml
from transformers import Qwen2Config

from oprd.cli import main
from oprd.insight import recipe_models, recipe_plan
from oprd.insight.planner import GB
from oprd.insight.recipe_plan import alternatives, plan_recipe, setup_of
from oprd.training.recipe import parse
from oprd.training.shipped import shipped

CONFIG = Qwen2Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    architectures=["Qwen2ForCausalLM"],
)


@pytest.fixture
def recipe(tmp_path):
    def write(**settings):
        for role in ("student", "teacher"):
            CONFIG.save_pretrained(tmp_path / role)
        known = {
            "model_name_or_path": str(tmp_path / "student"),
            "teacher_model_name_or_path": str(tmp_path / "teacher"),
            "output_dir": str(tmp_path / "run"),
            "max_completion_length": 100,
            "max_prompt_length": 20,
            "per_device_train_batch_size": 2,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (known | settings).items() if v is not None}))
        return ["--config", str(path)]

    return write


def test_a_recipe_and_its_other_scope(recipe):
    found = plan_recipe(recipe(), gpu_memory=80)
    assert [row["objective"] for row in found.rows] == ["this recipe", "suffix gradient"]
    own, suffix = found.rows
    assert own["tokens"] == suffix["tokens"] == 2 * 119
    assert own["with gradient"] == 2 * 119
    assert suffix["with gradient"] == own["supervised"] == 200  # the prompt's last token predicts the first
    assert own["fits"] == "yes" and not found.remedies
    assert found.verdict.startswith("fits: ")
    assert not (found.plan.setup.shapes.is_packed)


def test_every_objective_in_both_scopes(recipe):
    setup = plan_recipe(recipe(), gpu_memory=80).plan.setup
    names = [name for name, _ in alternatives(setup)]
    assert len(names) == 12
    assert {"OPRD, full gradient", "top-16, suffix gradient", "full KL, full gradient"} <= set(names)


def test_half_precision_is_what_the_gpu_would_use(recipe):
    import torch

    def autocast(**settings):
        return plan_recipe(recipe(**settings), gpu_memory=80).plan.setup.shapes.autocast

    assert autocast() is torch.bfloat16  # left open, a GPU takes it
    assert autocast(bf16=True) is torch.bfloat16
    assert autocast(bf16=False) is None
    assert autocast(use_cpu=True) is None
    assert autocast(dtype="bfloat16", bf16=True) is None  # the weights are that already


def test_packed_rows_fill_the_budget(recipe):
    shapes = plan_recipe(recipe(max_tokens_per_microbatch=300, per_device_train_batch_size=8), gpu_memory=80)
    assert shapes.plan.setup.shapes.rows == ((20, 100), (20, 100), (20, 40))
    few = plan_recipe(recipe(max_tokens_per_microbatch=300, per_device_train_batch_size=1), gpu_memory=80)
    assert few.plan.setup.shapes.rows == ((20, 100),)
    with pytest.raises(ValueError, match="to 120 or more"):
        plan_recipe(recipe(max_tokens_per_microbatch=119), gpu_memory=80)


def test_what_is_assumed_is_said(recipe):
    notes = " ".join(plan_recipe(recipe(max_prompt_length=None), gpu_memory=80).notes)
    assert "512 tokens" in notes and "100 tokens" in notes
    given = plan_recipe(recipe(max_prompt_length=None), gpu_memory=80, prompt_tokens=7)
    assert given.plan.setup.shapes.rows[0] == (7, 100)


def test_head_and_bridge_are_settled_as_in_training(recipe, tmp_path):
    adopted = plan_recipe(recipe(), gpu_memory=80).plan
    assert adopted.setup.objective.logit_weight == 0 and adopted.setup.shapes.lm_head == "teacher"
    kept = plan_recipe(recipe(lm_head="keep"), gpu_memory=80).plan
    assert kept.setup.objective.logit_weight == 1 and kept.gradients > adopted.gradients
    deep = Qwen2Config(**{**CONFIG.to_dict(), "num_hidden_layers": 4, "layer_types": None})
    settings = recipe(bridge="auto", bridge_rank=8)
    deep.save_pretrained(tmp_path / "teacher")
    assert plan_recipe(settings, gpu_memory=80).plan.setup.shapes.bridge_rank == 8
    settings = recipe()
    deep.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="set bridge"):
        plan_recipe(settings, gpu_memory=80)


def test_a_recipe_that_does_not_fit_is_told_what_helps(recipe):
    found = plan_recipe(recipe(gradient_checkpointing=False), gpu_memory=1.055)
    assert found.rows[0]["fits"] == "no" and found.verdict.startswith("does not fit")
    changes = {row["change"]: row for row in found.remedies}
    assert "gradient_checkpointing: true" in changes
    assert any("position_k: 25" in change for change in changes) and any("LoRA" in change for change in changes)
    assert any(change.startswith("all of these together, without use_peft") for change in changes)
    assert [row["peak GB"] for row in found.remedies] == sorted(row["peak GB"] for row in found.remedies)
    with pytest.raises(ValueError, match="1 GB and 5 %"):
        plan_recipe(recipe(), gpu_memory=1.0)
    with pytest.raises(ValueError, match="needs both models"):
        plan_recipe(recipe(teacher_model_name_or_path=None), gpu_memory=80)


def test_the_command(recipe, capsys):
    arguments = ["plan", *recipe(), "--gpu-memory", "80", "--gpus", "2", "--sharding", "zero2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["assumed"] and not found["remedies"]
    assert [row["objective"] for row in found["rows"]] == ["this recipe", "suffix gradient"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "fits: " in out and "assumed: every response as long as it may be, 100 tokens" in out
    assert main(["plan", *recipe(), "--gpus", "0"]) == 1
    assert "--gpus must be positive" in capsys.readouterr().err
    assert main(["plan", *recipe(), "--layerz", "2"]) == 1
    assert "did you mean --layers" in capsys.readouterr().err


def test_sizes_do_not_depend_on_the_machine(recipe):
    found = plan_recipe(recipe(), gpu_memory=80).plan
    assert found.gpu == 80 * GB
    assert found.room == pytest.approx(75 * GB)


def test_models_that_cannot_pack_are_planned_without(recipe, tmp_path):
    from transformers import Gemma2Config

    settings = recipe(lm_head="keep", logit_weight=0)
    shape = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    for role in ("student", "teacher"):
        config = Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=64)
        config.architectures = ["Gemma2ForCausalLM"]
        config.save_pretrained(tmp_path / role)
    found = plan_recipe(settings, gpu_memory=80)
    assert [row["fits"] for row in found.rows] == ["yes", "cannot run"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bridge": "nowhere"}, "no bridge in nowhere"),
        ({"teacher_model_name_or_path": "./nowhere"}, "teacher_model_name_or_path: ./nowhere is no folder"),
        (
            {"attn_implementation": "flash_attention_2", "max_tokens_per_microbatch": 400},
            "max_tokens_per_microbatch needs",
        ),
        ({"attn_implementation": "eager", "gradient_scope": "suffix"}, "gradient_scope: suffix needs"),
    ],
)
def test_what_training_would_refuse_is_refused(recipe, settings, message):
    with pytest.raises(ValueError, match=message):
        plan_recipe(recipe(**settings), gpu_memory=80)


def test_sharding_needs_several_gpus(recipe):
    with pytest.raises(ValueError, match="set --gpus"):
        plan_recipe(recipe(), gpu_memory=80, sharding="zero2")


TEACHERS = {
    "changes": {"representation_loss": "transition", "transition_over": "both"},
    "maps": {"attention_weight": 1.0, "attention_keys": 8},
    "weights": {"layer_weighting": "adaptive", "positions": "adaptive"},
    "itself, live": {
        "teacher_model_name_or_path": None,
        "teacher_model_kind": "live",
        "teacher_prompt_template": "{prompt}{hint}",
    },
    "itself, a copy": {
        "teacher_model_name_or_path": None,
        "teacher_model_kind": "base",
        "teacher_prompt_template": "{prompt}{hint}",
    },
}


@pytest.mark.parametrize("case", TEACHERS)
def test_what_is_compared_with_whom(recipe, case):
    plain, found = (plan_recipe(recipe(**settings), gpu_memory=80).plan for settings in ({}, TEACHERS[case]))
    assert found.peak > 0
    assert found.teacher == (0 if case == "itself, live" else plain.teacher)


def test_several_teachers(recipe, tmp_path):
    teachers = {name: {"model_name_or_path": str(tmp_path / "teacher")} for name in "abc"}
    alone = {"teacher_model_name_or_path": None, "teachers": teachers}
    plain = plan_recipe(recipe(), gpu_memory=80).plan
    together = plan_recipe(recipe(**alone), gpu_memory=80)
    routed = plan_recipe(recipe(**alone, teacher_column="kind"), gpu_memory=80).plan
    apart = plan_recipe(recipe(**alone, teacher_column="kind", offload_teacher=True), gpu_memory=80).plan
    assert together.plan.teacher == routed.teacher == pytest.approx(3 * plain.teacher, rel=1e-3)  # buffers aside
    assert together.plan.targets == 3 * plain.targets and routed.targets == plain.targets
    assert apart.teacher == 3 * plain.counts.teacher_head
    assert any("of 3 teachers the largest" in note for note in together.notes)


@pytest.fixture
def small_models(monkeypatch):
    """The Hub's models by small configs; what a plan takes from a recipe is the same."""
    wide = Qwen2Config.from_dict(CONFIG.to_dict() | {"hidden_size": 128, "num_hidden_layers": 3, "layer_types": None})
    honest = recipe_models.config_of

    def use(name):
        unlike = "bridge" in name or name.startswith("qwen3-1.7b-base")

        def config_of(key, model, *more):
            if model.startswith("miniature:"):
                return honest(key, model, *more)
            return wide if unlike and key.startswith("teacher") else CONFIG

        for module in (recipe_models, recipe_plan):
            monkeypatch.setattr(module, "config_of", config_of)

    return use


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_can_be_planned(name, small_models):
    small_models(name)
    configs = parse(["--config", name, "--use_cpu", "true"], "plan")
    setup, _ = setup_of(configs, bf16=True, prompt_tokens=None, processes=1, sharding="none")
    assert sum(setup.shapes.rows[0]) > configs.args.max_completion_length


def test_a_shipped_recipe_is_planned(small_models):
    small_models("qwen3-1.7b-base-bridge-paper")
    found = plan_recipe(["--config", "qwen3-1.7b-base-bridge-paper"], gpu_memory=80)
    assert found.plan.fits and found.plan.peak > 0 and found.rows[0]["objective"] == "this recipe"
