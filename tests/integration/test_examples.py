"""The scripts of ``examples`` as a reader runs them, a few updates and a few problems each."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd.bridge import Bridge
from oprd.models import resolve_path

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(script, *arguments):
        told = ["--max_steps", "2", "--problems", "4", "--output_dir", str(tmp_path / "run"), *arguments]
        monkeypatch.setattr(sys, "argv", [script, *told])
        names = runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        return names, tmp_path / "run" / "final", capsys.readouterr().out

    return run


def check(trainer, final, start, out):
    """A finite loss, weights that moved from ``start``, a folder that loads and answers, and scores before and after."""
    losses = [row["train_loss"] for row in trainer.state.log_history if "train_loss" in row]
    assert losses and all(math.isfinite(loss) and loss > 0 for loss in losses)
    before = AutoModelForCausalLM.from_pretrained(resolve_path(start), use_safetensors=True).state_dict()
    after = AutoModelForCausalLM.from_pretrained(final, use_safetensors=True)
    moved = [name for name, weight in after.state_dict().items() if not weight.equal(before[name])]
    assert any(".layers.0." in name for name in moved) and any(".layers.3." in name for name in moved)
    assert all(torch.isfinite(weight).all() for weight in after.parameters())
    ids = AutoTokenizer.from_pretrained(final)("37+4-9+2=?", return_tensors="pt")
    assert after.generate(input_ids=ids["input_ids"], max_new_tokens=3).shape[1] == ids["input_ids"].shape[1] + 3
    assert "before" in out and "after" in out and str(final) in out
    return moved


def test_same_family(run):
    names, final, out = run("same_family")
    moved = check(names["trainer"], final, "miniature:student", out)
    assert "lm_head.weight" in moved  # the teacher's
    teacher = AutoModelForCausalLM.from_pretrained(resolve_path("miniature:teacher"), use_safetensors=True)
    after = AutoModelForCausalLM.from_pretrained(final, use_safetensors=True)
    assert after.lm_head.weight.equal(teacher.lm_head.weight)


def test_bridge(run):
    names, final, out = run("bridge", "--bridge_prompts", "40")
    moved = check(names["trainer"], final, "miniature:student", out)
    assert "lm_head.weight" in moved  # solved, then trained
    saved = Bridge.from_pretrained(final.parent / "bridge")
    assert saved.rank == 64 and saved.report["controls"]["bridge"]["explained"] > 0.5
    assert "random teacher" in out


def test_self_distillation(run):
    names, final, out = run("self_distillation")
    moved = check(names["trainer"], final, "miniature:careless", out)
    assert "lm_head.weight" not in moved  # nothing moves the student's own head
    assert "asked for care" in out
