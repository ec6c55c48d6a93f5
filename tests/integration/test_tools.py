"""Training with a tool in the loop, from Python and from a recipe, until the student has learnt something."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig

from oprd.cli import main
from oprd.lineage.manifest import read_manifest
from oprd.training.callbacks import read_metrics
from tiny import logged, tiny_model, tiny_tokenizer
from tooled import SCRIPTS, TEMPLATE, memorised, tooled_tokenizer, tooled_trainer, user

ANSWERS = ["3", "15", "7", "8", "5", "6", "11", "8"]  # of SCRIPTS, three of them not what the student says


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="padded"),
        pytest.param(
            {"max_tokens_per_microbatch": 150, "gradient_scope": "suffix", "output_loss": "full"}, id="packed"
        ),
        pytest.param({"trainer_kwargs": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}}, id="LoRA"),
    ],
)
def test_two_updates(tmp_path, settings):
    asked = []

    def add(terms: str) -> str:
        """
        Adds two numbers; what it says is boxed, which is no answer of the student's.

        Args:
            terms: Such as 1+2.
        """
        asked.append(terms)
        first, second = terms.split("+")
        return f"\\boxed{{{int(first) + int(second)}}}"

    trainer = tooled_trainer(tmp_path, tools=[add], answers=ANSWERS, **settings)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    once = ["1+2", "4+5", "9+6", "8+x", "5+5", "10+1", "11+1", "6+1", "7+1"]
    assert sorted(asked) == sorted(once * 2)
    assert logged(trainer, "tools/call_frequency") == [10 / 8] * 2  # one call is of a tool that is not there
    assert logged(trainer, "tools/failure_frequency") == pytest.approx([2 / 10] * 2)
    right = [q for q, answer in zip(SCRIPTS, ANSWERS, strict=True) if f"\\boxed{{{answer}}}" in SCRIPTS[q][-1]]
    assert logged(trainer, "accuracy") == [len(right) / 8] * 2
    said = sum(len(tooled_tokenizer()(turn)["input_ids"]) for turns in SCRIPTS.values() for turn in turns)
    assert logged(trainer, "response_tokens") == [said] * 2
    losses = logged(trainer)
    assert losses[1] < losses[0]
    moved = [name for name, p in trainer.model.named_parameters() if name in start and not torch.equal(p, start[name])]
    assert len(moved) > len(start) / 3


def test_results_weigh_nothing(tmp_path):
    trainer = tooled_trainer(tmp_path)
    batch = trainer._generate_and_score_completions(list(trainer.train_dataset))
    results = batch["completion_mask"].bool() & ~batch["tool_mask"].bool()
    assert results.sum() > 50
    assert (batch["state_weights"][results] == 0).all() and (batch["output_weights"][results] == 0).all()
    assert batch["state_weights"].sum() == pytest.approx(1.0)


def test_teachers_that_read_otherwise(tmp_path):
    other = tooled_tokenizer(TEMPLATE.replace("<result>", "<result> "))
    with pytest.raises(ValueError, match="one chat_template"):
        tooled_trainer(tmp_path, trainer_kwargs={"teacher_processing_class": other})
    with pytest.raises(ValueError, match="tools need one tokenizer"):
        tooled_trainer(
            tmp_path,
            teacher=tiny_model(),
            representation_weight=0,
            output_loss="top_k",
            trainer_kwargs={"teacher_processing_class": tiny_tokenizer()},
        )


ASKED = "1+2 in \\boxed{}"
CHAT = [
    *user(ASKED),
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"terms": "1+2"}}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "\\boxed{3}"},
]  # fmt: skip
TOOL = '''
from pathlib import Path


def add(terms: str) -> str:
    """
    Adds two numbers.

    Args:
        terms: Such as 1+2.
    """
    with Path(__file__).with_suffix(".asked").open("a") as file:
        file.write(terms + "\\n")
    return str(sum(map(int, terms.split("+"))))
'''


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Student and teacher that know the chat by heart, a tool, prompts, a recipe."""
    folder = tmp_path_factory.mktemp("tools")
    for role, steps in (("student", 60), ("teacher", 90)):
        model, tokenizer = memorised(CHAT, seed=0, steps=steps)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    (folder / "my_tools.py").write_text(TOOL)
    rows = [{"prompt": ASKED, "answer": "3"}] * 4
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "quiz.jsonl").write_text(json.dumps({"prompt": user(ASKED), "answer": "3"}) + "\n")
    (folder / "text.jsonl").write_text(json.dumps({"prompt": ASKED, "answer": "3"}) + "\n")
    recipe = {
        "model_name_or_path": "student",
        "teacher_model_name_or_path": "teacher",
        "dataset_name": "train.jsonl",
        "as_chat": True,
        "tools": ["my_tools.py:add"],
        "output_dir": "run",
        "eval_dataset_name": "train.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "validation_benchmark": "quiz.jsonl",
        "benchmark_steps": 2,
        "benchmark_samples": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 40,
        "temperature": 0.1,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def asked_in(workplace):
    path = workplace / "my_tools.asked"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_a_recipe_with_tools_and_its_repetition(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert main(["train", "--config", "recipe.yaml"]) == 0
    assert set(asked_in(workplace)) == {"1+2"}
    rows = read_metrics(workplace / "run" / "metrics.jsonl")
    assert [row["tools/call_frequency"] for row in rows if "tools/call_frequency" in row] == [1.0, 1.0]
    assert [row["accuracy"] for row in rows if "accuracy" in row] == [1.0, 1.0]
    assert [row["eval_accuracy"] for row in rows if "eval_accuracy" in row] == [1.0]
    assert [row["validation/quiz/avg_at_k"] for row in rows if "validation/quiz/avg_at_k" in row] == [100.0, 100.0]
    (settings,) = (workplace / "run").glob("evaluations/step-000002/quiz/settings.json")
    assert json.loads(settings.read_text())["engine"] == "transformers (rollouts with tools)"
    manifest = read_manifest(workplace / "run")
    assert yaml.safe_load((workplace / "run" / "config.yaml").read_text())["tools"] == "my_tools.py:add"
    assert manifest["data"]["tool add"]["name"] == "my_tools.py:add"

    elsewhere = workplace / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    repeat = ["train", "--from", "../run", "--output_dir", "again"]
    assert main(repeat) == 0
    assert set(asked_in(workplace)) == {"1+2"}
    again = read_manifest(elsewhere / "again")
    assert again["final"]["hash"] == manifest["final"]["hash"]

    (workplace / "my_tools.py").write_text(TOOL.replace("sum(map", "1 + sum(map"))
    capsys.readouterr()
    assert main([*repeat[:-1], "third"]) != 0
    assert "data (tool add)" in capsys.readouterr().err
    (workplace / "my_tools.py").write_text(TOOL)


BAD = {
    "no such file": ({"tools": "gone.py:add"}, "there is no file gone.py"),
    "no such function": ({"tools": "my_tools.py:sub"}, "has no function 'sub'; it has add"),
    "text prompts": ({"as_chat": "false"}, "prompts are text"),
    "a benchmark of text": ({"validation_benchmark": "text.jsonl"}, "text.jsonl: its prompts are text"),
    "no room for what tools say of themselves": (
        {"max_completion_length": 115, "benchmark_max_new_tokens": 20},  # 12 tokens of prompt, 15 with the tool's
        "a prompt of 15 tokens and a response of 115 do not fit the context of 128",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_recipes(workplace, monkeypatch, capsys, fault):
    monkeypatch.chdir(workplace)
    settings, told = BAD[fault]
    settings = {**settings, "output_dir": f"bad-{fault.replace(' ', '-')}"}
    spoken = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    assert main(["train", "--config", "recipe.yaml", *spoken]) != 0
    assert told in capsys.readouterr().err
