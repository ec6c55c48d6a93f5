"""`oprd recipes` and `oprd show`: what ships, and what follows from it."""

import json
from importlib.resources import files

import pytest
import yaml

from oprd.cli import main
from oprd.training.recipe import parse
from oprd.training.shipped import about, find_recipe, objective, shipped

RECIPES = {path.name.removesuffix(".yaml"): path for path in files("oprd").joinpath("recipes").iterdir()}


def test_every_recipe_is_listed_with_what_it_is_for(capsys):
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == sorted(RECIPES)
    for row in rows:
        assert set(row) == {"name", "purpose", "student", "teacher", "objective"} and all(row.values()), row
        assert row["purpose"].endswith(".") and "oprd train" not in row["purpose"]
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{row['name']}\n" in f"\n{out}" and row["objective"] in out for row in rows)
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "hidden states"),
        ({"bridge": "auto", "then": {"representation_weight": 0, "output_loss": "full"}}, "hidden states through a bridge, then all next tokens"),
        ({"representation_weight": 10.0, "output_loss": "sampled"}, "10 x hidden states + sampled token"),
        ({"representation_weight": 0, "output_loss": "top_k", "output_top_k": 4, "logit_weight": 1}, "top-4 tokens + logits"),
    ],
    ids=["default", "two stages", "composite", "output"],
)  # fmt: skip
def test_an_objective_in_words(settings, told):
    assert objective(settings) == told


def test_teachers_in_words():
    assert about(shipped()["miniature-merge"])["teacher"] == "miniature:plus and miniature:minus"
    assert about(shipped()["miniature-self"])["teacher"] == "itself (base)"


@pytest.mark.parametrize("name", ["miniature", "miniature.yaml"])
def test_a_recipe_is_shown_as_it_ships(name, capsys):
    assert main(["show", name]) == 0
    assert capsys.readouterr().out == RECIPES["miniature"].read_text()


def test_every_setting_as_training_would_use_it(capsys):
    given = ["--max-steps", "7", "--layers", "2,4"]
    assert main(["show", "miniature", "--resolved", *given]) == 0
    out = capsys.readouterr().out
    _, args, model, bridge, _ = parse(["--config", "miniature", "--max_steps", "7", "--layers", "2,4"])
    told = yaml.safe_load(out)
    assert told["layers"] == args.layers == [2, 4] and told["max_steps"] == 7
    for name in ("learning_rate", "weight_decay", "seed", "adam_beta2", "lm_head", "use_cpu", "position_k"):
        assert told[name] == getattr(args, name), name
    assert told["model_name_or_path"] == model.model_name_or_path and told["bridge_prompts"] == bridge.bridge_prompts
    lines = out.splitlines()
    assert "learning_rate: 0.002" in lines and "adam_beta2: 0.999  # default" in lines and "max_steps: 7" in lines
    assert not any("token: " in line and "hub" in line for line in lines)


def test_a_recipe_for_gpus_is_resolved_anywhere(capsys):
    assert main(["show", "r1-distill-1.5b", "--resolved", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["training"]["bf16"] is True and told["training"]["use_cpu"] is False
    assert told["objective"]["lm_head"] == "auto" and told["data"]["drop_duplicates"] is True


def test_what_cannot_be_shown(capsys):
    for words, told in (
        (["show", "minature"], "There is no recipe minature; did you mean miniature"),
        (["train", "--config", "r1-distil-1.5b"], "did you mean r1-distill-1.5b"),
        (["show", "miniature", "--max_steps", "3"], "--max_steps would be ignored: a recipe is shown as it is"),
        (["show", "miniature", "--resolved", "--max_step", "3"], "did you mean --max_steps?"),
    ):
        assert main(words) == 1
        assert told in capsys.readouterr().err


def test_a_run_without_output_dir_goes_where_its_recipe_says(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("use_cpu: true\n")
    assert parse(["--config", str(own)]).args.output_dir == "runs/mine"
    assert parse(["--config", str(own), "--output_dir", "x"]).args.output_dir == "x"
    assert find_recipe(str(own)) == own
    with pytest.raises(ValueError, match="set output_dir, such as"):
        parse(["--use_cpu", "true"])
