"""``oprd train`` on a real-shaped checkpoint and real-shaped data, through the command line, to a model that generates."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from oprd.cli import main
from oprd.training.callbacks import read_metrics

# Public problem sets may lie beside the checkout; without them a file in the same layout is made.
REAL_DATA = (
    Path(os.environ.get("OPRD_DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "dapo-math-1k.parquet"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    if REAL_DATA.exists():
        return REAL_DATA
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {a} + {b}? Put the answer in \\boxed{{}}."}],
            "reward_model": {"ground_truth": str(a + b), "style": "rule"},
            "data_source": "made",
            "ability": "MATH",
            "extra_info": {"index": a},
        }
        for a in range(8)
        for b in range(8)
    ]
    path = tmp_path_factory.mktemp("data") / "made.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, data):
    """A Qwen2 student and teacher of one origin with byte-level BPE, ChatML and a padded vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [m["content"] for row in Dataset.from_parquet(str(data)).select(range(64))["prompt"] for m in row]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    root = tmp_path_factory.mktemp("checkpoints")
    for role, rows, noise in (("student", 512, 0.0), ("teacher", 520, 0.02)):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=520,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        model.resize_token_embeddings(rows)
        model.save_pretrained(root / role)
        tokenizer.save_pretrained(root / role)
    return root


@pytest.fixture
def recipe(tmp_path, checkpoints, data):
    path = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": str(checkpoints / "student"),
        "teacher_model_name_or_path": str(checkpoints / "teacher"),
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "responses_per_prompt": 2,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "logit_weight": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def generates(final):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False
    )
    assert output.shape[1] > inputs["input_ids"].shape[1]
    return model


def weights_of(path):
    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())


def test_from_recipe_to_a_model_that_generates(recipe, tmp_path, checkpoints, capsys):
    assert main(["train", "--config", str(recipe), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)[0]
    run = tmp_path / "run"
    model = generates(run / "final")
    teacher = AutoModelForCausalLM.from_pretrained(checkpoints / "teacher")
    student = AutoModelForCausalLM.from_pretrained(checkpoints / "student")
    assert model.config.vocab_size == 512  # the student's own shape, padding and all
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, student.model.layers[0].mlp.up_proj.weight)
    # The head was adopted for the tokenizer's tokens and then trained; the padded rows are the student's.
    tokens = len(AutoTokenizer.from_pretrained(run / "final"))
    assert model.lm_head.weight[tokens:].equal(student.lm_head.weight[tokens:])
    drift = [(model.lm_head.weight[:tokens] - m.lm_head.weight[:tokens]).norm() for m in (teacher, student)]
    assert 0 < drift[0] < drift[1]

    metrics = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert row["loss"] == pytest.approx(row["loss/representation"] + row["loss/logit"], rel=1e-3)
        assert row["cosine"] == pytest.approx(sum(row[f"cosine/layer_{i:02d}"] for i in (1, 2, 3)) / 3, abs=1e-4)
        assert 0 <= row["accuracy"] <= 1
        assert row["completions/min_length"] <= row["completions/mean_length"] <= row["completions/max_length"] <= 12
        assert 0 <= row["completions/clipped_ratio"] <= 1
        assert min(row[f"time/{phase}"] for phase in ("rollout", "teacher", "student")) > 0
        assert row["tokens_per_second"] > 0
        assert "entropy/student" not in row  # no output loss paid for the head
    assert summary["steps"] == 3
    drawn = {path.name for path in Path(summary["plots"]).iterdir()}
    assert drawn == {"accuracy.png", "cosine.png", "length.png", "loss.png"}
    assert main(["train", "--config", str(recipe)]) == 1  # a finished run is never written over
    assert "holds a finished run" in capsys.readouterr().err
    assert not (run / "final" / "training_args.bin").exists()
    assert "2606.06021" in (run / "final" / "README.md").read_text()


def test_a_run_repeats_from_its_own_record(recipe, tmp_path):
    assert main(["train", "--config", str(recipe), "--output_loss", "top_k", "--layers", "1,3"]) == 0
    record = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(record.read_text())["layers"] == [1, 3]
    assert main(["train", "--config", str(record), "--output_dir", str(tmp_path / "again")]) == 0
    first, again = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "again"))
    for one, two in zip(first, again, strict=True):
        for key in ("loss", "loss/output", "cosine", "entropy/teacher", "overlap/top16", "completions/mean_length"):
            assert one.get(key) == two.get(key), key
    ours, twin = (weights_of(tmp_path / name / "final") for name in ("run", "again"))
    assert all(torch.equal(ours[name], twin[name]) for name in twin)


def test_lora_trains_adapters_and_leaves_a_plain_model(recipe, tmp_path, checkpoints):
    arguments = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "up_proj"]
    assert main(["train", "--config", str(recipe), *arguments]) == 0
    final = tmp_path / "run" / "final"
    assert not list(final.glob("adapter*"))
    generates(final)
    ours, student, teacher = (weights_of(p) for p in (final, checkpoints / "student", checkpoints / "teacher"))
    changed = {name for name in student if not torch.equal(ours[name], student[name])}
    assert changed == {n for n in student if "q_proj.weight" in n or "up_proj.weight" in n} | {"lm_head.weight"}
    tokens = len(AutoTokenizer.from_pretrained(final))
    assert ours["lm_head.weight"][:tokens].equal(teacher["lm_head.weight"][:tokens])  # adopted, and frozen under LoRA


def test_resume_continues_where_it_was(recipe, tmp_path):
    whole = ["--config", str(recipe), "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    assert main(["train", *whole]) == 0
    undisturbed = tmp_path / "undisturbed"
    (tmp_path / "run").rename(undisturbed)
    stopped = tmp_path / "run"
    stopped.mkdir()
    (undisturbed / "checkpoint-2").rename(stopped / "checkpoint-2")
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:3]))  # it had got to step 3 when it was killed

    assert main(["train", *whole]) == 1  # never over an existing run by accident
    assert main(["train", *whole, "--resume", "true"]) == 0
    resumed, twin = (
        [row for row in read_metrics(path / "metrics.jsonl") if "loss" in row] for path in (stopped, undisturbed)
    )
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in twin]
    ours, expected = (weights_of(path / "final") for path in (stopped, undisturbed))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_evaluation_during_training(recipe, tmp_path, data):
    rows = [{"problem": "What is 1 + 1?", "answer": "2"}, {"problem": "What is 2 + 2?", "answer": "4"}]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["--eval_strategy", "steps", "--eval_steps", "3", "--eval_dataset_name", str(held_out)]
    assert main(["train", "--config", str(recipe), "--per_device_eval_batch_size", "2", *arguments]) == 0
    last = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_accuracy" in row]
    assert len(last) == 1
    assert last[0]["eval_loss"] == pytest.approx(
        last[0]["eval_loss/representation"] + last[0]["eval_loss/logit"], rel=1e-3
    )


def test_bf16_keeps_losses_in_float32(recipe, tmp_path):
    assert main(["train", "--config", str(recipe), "--bf16", "true", "--output_loss", "full"]) == 0
    exact = tmp_path / "exact"
    assert main(["train", "--config", str(recipe), "--output_loss", "full", "--output_dir", str(exact)]) == 0
    low, high = (read_metrics(p / "metrics.jsonl")[0] for p in (tmp_path / "run", exact))
    assert low["loss/representation"] == pytest.approx(high["loss/representation"], rel=0.05)
    assert low["loss/representation"] != high["loss/representation"]  # bf16 was really used
    assert low["loss/logit"] == pytest.approx(high["loss/logit"], rel=0.05)


def test_under_bf16_the_students_own_weights_are_no_distance(recipe, tmp_path, checkpoints):
    """The teacher takes the student's dtype: in pure bf16 what rounding adds up to over the layers would be something to
    learn. What is left here is one rounding, of the states that are held as targets."""
    own = ["--teacher_model_name_or_path", str(checkpoints / "student"), "--bf16", "true", "--max_steps", "1"]
    assert main(["train", "--config", str(recipe), *own]) == 0
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["loss/representation"] < 5e-6
    assert row["cosine"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_completion_length": 4096}, "do not fit the context of 4096"),
        ({"lm_head": "mine"}, "auto, teacher, keep, freeze"),
        ({"dataset_name": "nowhere.parquet"}, "There is no file"),
        ({"teacher_model_name_or_path": None}, "No teacher"),
        ({"logit_wieght": 1}, "logit_wieght"),
    ],
)
def test_bad_settings_are_one_line_and_exit_1(recipe, tmp_path, capsys, change, message):
    settings = yaml.safe_load(recipe.read_text()) | change
    recipe.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    assert main(["train", "--config", str(recipe)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("oprd: error:")
    assert message in error
    assert not (tmp_path / "run" / "final").exists()
