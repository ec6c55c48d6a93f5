"""Good input to spoil, made once; and a trainer that must never come to take a step."""

import json
import shutil

import pytest
import torch
import transformers

from badinput.harness import Place
from oprd.training.trainer import OPRDTrainer
from runs import answers, make_run, quiz
from tiny import random_bridge, tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Everything that is read by a run and by the other commands, as it should be."""
    root = tmp_path_factory.mktemp("good")
    for role, seed in (("student", 0), ("teacher", 1)):
        tiny_model(seed=seed).save_pretrained(root / role)
        tiny_tokenizer().save_pretrained(root / role)
    rows = [{"prompt": "abc"[: 1 + n % 3] + str(n), "answer": str(n)} for n in range(8)]
    for name in ("prompts.jsonl", "problems.jsonl"):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    random_bridge(teacher_width=16, teacher_layers=3).save_pretrained(root / "bridge")
    quizzed = quiz()
    for name in ("one", "two"):
        make_run(root / "runs" / name, [[True, False]] * 8, on=quizzed)
    (root / "gates.yaml").write_text("accuracy: {min: 1}\n")
    assert answers([[True]])
    return root


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A copy of the good input, and the settings of a recipe that would train on it."""
    root = tmp_path / "place"
    shutil.copytree(good, root, symlinks=True)
    monkeypatch.chdir(root)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return Place(
        root,
        {
            "model_name_or_path": str(root / "student"),
            "teacher_model_name_or_path": str(root / "teacher"),
            "dataset_name": str(root / "prompts.jsonl"),
            "output_dir": str(root / "out"),
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    )


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch):
    """Bad input is refused before an answer is drawn or a step taken."""

    def started(*_, **__):
        raise AssertionError("a step was begun")

    monkeypatch.setattr(OPRDTrainer, "_generate_and_score_completions", started)
    monkeypatch.setattr(OPRDTrainer, "training_step", started)
    monkeypatch.setattr(transformers.GenerationMixin, "generate", started)


@pytest.fixture(autouse=True)
def _seeds_as_they_were():
    """Trainers seed the process."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
