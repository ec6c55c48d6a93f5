"""SIGTERM and kills inside of one process, at chosen places: what was left undone is done first, and nothing else changes."""

import json
import os
import signal

import pytest

from oprd.cli import main
from oprd.lineage.hashing import folder_hashes
from oprd.lineage.manifest import read_manifest
from oprd.models import resolve_path
from oprd.training import bridging, checkpoints, solved_head, validation
from oprd.training.callbacks import read_metrics
from oprd.training.checkpoints import CheckpointedTrainer
from oprd.training.trainer import OPRDTrainer

SMALL = {"max_steps": 4, "per_device_train_batch_size": 4, "max_completion_length": 36, "logging_steps": 3}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8, "disable_tqdm": "true"}
SCORED = {"validation_benchmark": "miniature:validation.jsonl", "benchmark_steps": 2, "benchmark_limit": 4}
BRIDGED = {
    "dataset_name": "{data}",
    "bridge_prompts": 8,
    "bridge_held_out": 0.25,
    "max_steps": 2,
    "benchmark_batch_size": 8,
    **SCORED,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lines = open(resolve_path("miniature:train.jsonl")).read().splitlines(keepends=True)  # noqa: SIM115
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("".join(lines[:8]))
    return path


def train(run, data, status=0, config="miniature", **settings):
    flags = {**SMALL, "eval_dataset_name": None, "output_dir": run, **settings}
    if flags.get("eval_strategy"):
        flags["eval_dataset_name"] = data
    flags = {key: str(value).format(data=data) for key, value in flags.items() if value is not None}
    assert main(["train", "--config", config, *(part for k, v in flags.items() for part in (f"--{k}", v))]) == status
    return run


def result(run):
    """Weights and what was logged, times aside."""
    found = {}
    for stage in [path for path in (run, run / "then") if path.exists()]:
        rows = [
            {k: v for k, v in row.items() if not any(word in k for word in ("time", "per_second"))}
            for row in read_metrics(stage / "metrics.jsonl")
        ]
        found[stage.name if stage != run else ""] = rows, folder_hashes(stage / "final"), read_manifest(stage)["status"]
    return found


def interrupt(monkeypatch, owner, name, call, how):
    """Before the given call of a function: SIGTERM to this process, or an end as sudden as a kill's."""
    honest, calls = getattr(owner, name), []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == call:
            if how == "kill":
                raise KeyboardInterrupt
            os.kill(os.getpid(), getattr(signal, how))
        return honest(*given, **named)

    monkeypatch.setattr(owner, name, interrupted)
    return calls


@pytest.fixture(scope="module")
def expected(tmp_path_factory, data):
    return result(train(tmp_path_factory.mktemp("whole") / "run", data, **EVALUATED, **SCORED))


@pytest.mark.parametrize(
    ("owner", "name", "call", "step", "undone"),
    [
        (OPRDTrainer, "_generate_and_score_completions", 1, 1, ["benchmarks"]),
        (OPRDTrainer, "_micro_batch_loss", 2, 2, ["benchmarks", "evaluation"]),
        (validation._Watched, "generate", 2, 2, ["benchmarks", "evaluation"]),  # the first is before the first update
        (CheckpointedTrainer, "prediction_step", 1, 2, ["evaluation"]),
        (CheckpointedTrainer, "prediction_step", 2, 4, ["evaluation", "epoch_end"]),  # of the last step
    ],
    ids=["rollout", "update", "scores", "evaluation", "last evaluation"],
)
def test_sigterm(data, expected, tmp_path, monkeypatch, capsys, owner, name, call, step, undone):
    run = tmp_path / "run"
    calls = interrupt(monkeypatch, owner, name, call, "SIGTERM")
    train(run, data, **EVALUATED, **SCORED)
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert len(calls) >= call
    assert f"stopped by SIGTERM at step {step}, checkpoint-{step} written; the same command continues" in told
    assert read_manifest(run)["status"] == "interrupted"
    saved = checkpoints.load_tree(run / f"checkpoint-{step}", "process-0")
    assert saved["undone"] == undone
    train(run, data, **EVALUATED, **SCORED)
    assert f"continues from checkpoint-{step}" in capsys.readouterr().err
    assert result(run) == expected


def test_ctrl_c_saves_too(data, expected, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    interrupt(monkeypatch, OPRDTrainer, "_micro_batch_loss", 2, "SIGINT")
    train(run, data, status=130, **EVALUATED, **SCORED)
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert "Ctrl-C: finishing what is under way; a second one stops at once." in told
    assert "stopped by Ctrl-C at step 2, checkpoint-2 written; the same command continues" in told
    assert read_manifest(run)["status"] == "interrupted"
    train(run, data, **EVALUATED, **SCORED)
    assert result(run) == expected
    card = (run / "best" / "README.md").read_text()  # the best student has a card too
    step = json.loads((run / "best" / "score.json").read_text())["step"]
    assert f"best student, the one after update {step}" in card and (run / "final" / "README.md").exists()


EPOCHS = {**EVALUATED, "eval_strategy": "epoch", "logging_strategy": "epoch", "dataset_name": "{data}", "max_steps": 6}


@pytest.fixture(scope="module")
def by_epochs(tmp_path_factory, data):
    """8 prompts, two an update: four updates an epoch. (transformers calls an end of an epoch after the last update too.)"""
    return result(train(tmp_path_factory.mktemp("epochs") / "run", data, **EPOCHS))


@pytest.mark.parametrize(
    ("how", "name", "call", "step"),
    [
        ("SIGTERM", "_maybe_log_save_evaluate", 4, 4),  # the last update of an epoch, whose end is still to come
        ("SIGTERM", "prediction_step", 1, 4),
        ("kill", "prediction_step", 1, 4),  # behind a checkpoint of the epoch's last update
        ("kill", "_maybe_log_save_evaluate", 6, 4),  # in the second epoch
        ("kill", "_finalize_training", 1, 6),
    ],
)
def test_ends_of_epochs(data, by_epochs, tmp_path, monkeypatch, capsys, how, name, call, step):
    run = tmp_path / "run"
    saved = {"save_strategy": "steps", "save_steps": 4}
    calls = interrupt(monkeypatch, CheckpointedTrainer, name, call, how)
    train(run, data, status=0 if how == "SIGTERM" else 130, **EPOCHS, **saved)
    monkeypatch.undo()
    assert len(calls) >= call
    capsys.readouterr()
    train(run, data, **EPOCHS, **saved)
    assert f"continues from checkpoint-{step}" in capsys.readouterr().err
    assert result(run) == by_epochs


@pytest.mark.parametrize(
    ("owner", "name", "call", "told"),
    [
        (bridging, "_add_in_pieces", 1, "stopped by SIGTERM after 1 of 2 batches for the bridge"),
        (bridging, "solve_collection", 1, "stopped by SIGTERM with nothing to save"),
        (solved_head, "visit_states", 2, "stopped by SIGTERM at step 2, checkpoint-2 written"),
    ],
    ids=["collecting", "solving", "solving the head"],
)
def test_sigterm_around_a_bridge(data, tmp_path, tmp_path_factory, monkeypatch, capsys, owner, name, call, told):
    whole = tmp_path_factory.getbasetemp() / "bridged"
    if not whole.exists():
        train(whole, data, config="miniature-bridge", **BRIDGED)
    run = tmp_path / "run"
    interrupt(monkeypatch, owner, name, call, "SIGTERM")
    train(run, data, config="miniature-bridge", **BRIDGED)
    monkeypatch.undo()
    assert told in capsys.readouterr().err
    assert not (run / "bridge" / "bridge.json").exists() or name == "visit_states"
    train(run, data, config="miniature-bridge", **BRIDGED)
    assert result(run) == result(whole)
    assert not list((run / "bridge").glob("collected-*"))
