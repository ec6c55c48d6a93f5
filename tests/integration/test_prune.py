"""``oprd prune`` through the command line, and training runs on what it makes."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from oprd.cli import main
from oprd.models import recorded_layer_map
from oprd.training.callbacks import read_metrics
from oprd.training.run import run
from tiny import tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A teacher of five layers with a chat template, and chat prompts."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_model(layers=5).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    rows = [
        {"prompt": [{"role": "user", "content": text}]} for text in ("ab", "hello", "q1w2", "zz", "k", "u", "p0", "vw")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def prune(*more):
    return main(["prune", "teacher", "--data", "prompts.jsonl", "--answers", "6", "--batch_size", "4", *more])


def train(name, **settings):
    keys = {
        "model_name_or_path": "student",
        "teacher_model_name_or_path": "teacher",
        "dataset_name": "prompts.jsonl",
        "output_dir": name,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "warmup_steps": 0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    run([*(str(part) for key, value in keys.items() for part in (f"--{key}", value))])


def test_a_table_and_a_student(place, capsys):
    assert prune("--out", "student", "--keep", "3", "--prompts", "6") == 0
    told = capsys.readouterr()
    header, _, *rows = told.out.splitlines()
    assert header.split() == ["layer", "influence", "student", "layer", "compared", "with"]
    assert [row.split()[2] for row in rows].count("dropped") == 2 and len(rows) == 5
    assert rows[0].split()[2:] == ["kept", "1", "1"] and rows[4].split()[2:] == ["kept", "3", "5"]
    assert "Student: student" in told.err
    assert sorted(path.name for path in (place / "student").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pruning.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_json_for_machines(place, capsys):
    assert prune("--out", "student", "--layers", "1,3,4", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((place / "student/pruning.json").read_text())
    assert (record["kept"], record["dropped"], record["layer_map"]) == ([1, 3, 4], [2, 5], [1, 3, 5])
    assert len(record["influence"]) == 5 and record["positions"] > 18


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True, "max_tokens_per_microbatch": 48},
        {"use_peft": True, "lora_target_modules": "all-linear"},
    ],
    ids=["plain", "checkpointed and packed", "adapters"],
)
def test_a_pruned_student_learns(place, caplog, settings):
    assert main(["prune", "teacher", "--out", "student", "--layers", "1,3,5"]) == 0
    events = logging.getLogger("oprd.training.pair")  # the command line takes over the one above it
    events.addHandler(caplog.handler)
    try:
        train("run", **settings)
    finally:
        events.removeHandler(caplog.handler)
    assert "the student's with the teacher's: 1 with 1, 2 with 3, 3 with 5" in caplog.text
    cosines = [row["cosine"] for row in read_metrics(place / "run/metrics.jsonl") if "cosine" in row]
    assert len(cosines) == 3 and cosines[-1] > cosines[0]
    before, after = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("student", "run/final"))
    assert recorded_layer_map(after.config) == (1, 3, 5)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)  # the teacher's, and nothing trains it
    assert not torch.equal(after.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
