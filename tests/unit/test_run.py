import pytest
import yaml

from oprd.training.recipe import parse, resolved, without_secrets


def recipe(tmp_path, **settings):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "use_cpu": True, **settings}))
    return str(path)


def test_the_record_repeats_the_run_and_keeps_secrets(tmp_path):
    given = {
        "learning_rate": 3e-5,
        "layers": [1, 2],
        "lora_target_modules": ["q_proj", "up_proj"],
        "hub_token": "hf_secret",
        "resume": True,
    }
    record = resolved(parse(["--config", recipe(tmp_path, **given), "--accelerator_config", '{"split_batches": true}']))
    assert "hf_secret" not in yaml.safe_dump(record)
    assert "resume" not in record
    again = parse(["--config", recipe(tmp_path, **record)])
    assert resolved(again) == record
    _, args, model, *_ = again
    assert (args.learning_rate, args.layers, model.lora_target_modules) == (3e-5, [1, 2], ["q_proj", "up_proj"])
    assert args.accelerator_config.split_batches is True


def test_the_command_line_wins_over_the_recipe(tmp_path):
    _, args, *_ = parse(["--config", recipe(tmp_path, learning_rate=3e-5), "--learning_rate", "1e-4"])
    assert args.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", ""])
def test_a_recipe_is_a_mapping(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a mapping"):
        parse(["--config", str(path)])


def test_abbreviations_are_not_settings(tmp_path):
    with pytest.raises(ValueError, match="Unknown key --learning_rat; did you mean --learning_rate"):
        parse(["--config", recipe(tmp_path), "--learning_rat", "1e-4"])


def test_evaluation_needs_both_of_its_settings(tmp_path):
    from oprd.training.run import load_data

    shared = {"model_name_or_path": "miniature:student", "teacher_model_name_or_path": "miniature:teacher"}
    shared["dataset_name"] = "miniature:train.jsonl"
    for half in ({"eval_dataset_name": "miniature:test.jsonl"}, {"eval_strategy": "steps", "eval_steps": 1}):
        with pytest.raises(ValueError, match="one is missing"):
            load_data(parse(["--config", recipe(tmp_path, **shared, **half)]))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--hub_token", "hf_x", "--max_steps", "3"], ["--hub_token", "***", "--max_steps", "3"]),
        (["--hub_token=hf_x"], ["--hub_token=***"]),
        (["--model_init_kwargs", '{"token": "hf_x"}'], ["--model_init_kwargs", "***"]),
        (['--model_init_kwargs={"token": "hf_x"}'], ["--model_init_kwargs=***"]),
        (
            ["--max_tokens_per_microbatch", "64", "--eos_token", "</s>"],
            ["--max_tokens_per_microbatch", "64", "--eos_token", "</s>"],
        ),
    ],
)
def test_the_command_is_kept_without_its_secrets(given, kept):
    assert without_secrets(given) == kept
