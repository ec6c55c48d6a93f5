"""Every shipped recipe parses into checked configs and says what it is for."""

from importlib.resources import files

import pytest
import yaml

from oprd.models import resolve_path
from oprd.objectives import select_layers
from oprd.training.recipe import find_recipe, parse

RECIPES = sorted(path.name.removesuffix(".yaml") for path in files("oprd").joinpath("recipes").iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses(name):
    # bf16 needs a GPU that this machine may not have; everything else is as shipped.
    data, args, model, bridge, benchmark = parse(["--config", name, "--bf16", "false", "--use_cpu", "true"])
    text = find_recipe(name).read_text()
    assert f"--config {name}" in text.split("\nmodel_name_or_path")[0]
    settings = yaml.safe_load(text)
    for key in settings.keys() - {"bf16", "use_cpu", "report_to"}:
        owner = next(c for c in (data, args, model, bridge, benchmark) if hasattr(c, key))
        value = getattr(owner, key)
        value = getattr(value, "value", value)
        same = (
            str(value) == str(settings[key]) if isinstance(value, dict | str) else value == pytest.approx(settings[key])
        )
        assert same, key
    objective = args.objective(layers=select_layers(args.layers, 28), num_layers=28, vocab_size=10, head_adopted=True)
    assert objective.uses_output == (settings.get("output_loss", "none") != "none")
    assert data.dataset_name and model.model_name_or_path
    assert args.teacher_model_name_or_path or args.teachers or args.teacher_model_kind
    resolve_path(model.model_name_or_path)


def test_published_settings():
    """The paper's same-family run, value by value."""
    _, args, *_ = parse(["--config", "r1-distill-1.5b-oprd-paper", "--bf16", "false", "--use_cpu", "true"])
    assert (args.layers, args.positions, args.position_k, args.representation_loss) == ("all", "last_k", 2000, "mse")
    assert (args.learning_rate, args.max_steps, args.warmup_steps) == (1e-5, 500, 0.03)
    assert (args.max_completion_length, args.temperature, args.responses_per_prompt) == (16384, 1.0, 2)
    assert (args.logit_weight, args.output_loss, args.lm_head) == (0.0, "none", "keep")
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 16


def test_a_recipe_is_found_by_path_or_name(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("output_dir: x\n")
    assert find_recipe(str(own)) == own
    assert find_recipe("miniature") == find_recipe("miniature.yaml")
    with pytest.raises(ValueError, match="miniature"):
        find_recipe("missing")


@pytest.mark.parametrize(
    ("name", "rank"), [("qwen3-1.7b-base-bridge-paper", 8), ("phi4-mini-to-qwen3-1.7b-base-bridge-paper", 4)]
)
def test_published_settings_of_the_bridge(name, rank):
    """The paper's runs across architectures and tokenizers, value by value."""
    data, args, _, bridge, _ = parse(["--config", name, "--bf16", "false", "--use_cpu", "true"])
    assert (args.bridge, bridge.rank, bridge.bridge_prompts, data.then) == ("auto", rank, 2000, None)
    assert (args.layers, args.positions, args.position_k) == ("all", "last_k", 2000)
    assert (args.representation_loss, args.output_loss) == ("normalized_mse", "none")
    assert (args.learning_rate, args.max_steps, args.warmup_steps) == (1e-5, 500, 0.03)
    assert (args.max_completion_length, args.temperature, args.responses_per_prompt) == (16384, 1.0, 2)
    assert args.eos_token == "<|im_end|>"


def test_the_second_stage_calibrates_the_head():
    data, *_ = parse(["--config", "qwen3-1.7b-base-bridge-then-opd-paper", "--bf16", "false", "--use_cpu", "true"])
    assert (data.then["representation_weight"], data.then["output_loss"]) == (0, "sampled")
