"""Runs that are killed, stopped or starved of disk space, and the same command again: nothing is lost, nothing is different.

The full count of kills is `benchmarks/kill_test.py` (``make kill-test``); here are one of each kind.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oprd.cli import main
from oprd.lineage.hashing import folder_hashes
from oprd.lineage.manifest import read_manifest
from oprd.training.callbacks import read_metrics

HARNESS = Path(__file__).parents[2] / "benchmarks" / "kill_test.py"
SMALL = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def command(run, **settings):
    flags = {**SMALL, "output_dir": run, "disable_tqdm": "true", **settings}
    return ["train", "--config", "miniature", *(str(part) for k, v in flags.items() for part in (f"--{k}", v))]


def logged(run):
    """What a run has logged, times aside."""
    timed = ("time", "runtime", "per_second")
    return [
        {k: v for k, v in row.items() if not any(word in k for word in timed)}
        for row in read_metrics(run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone, with one thread as those that are killed have."""
    run = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run([sys.executable, "-m", "oprd", *command(run)], env=ENVIRONMENT, check=True, capture_output=True)
    return run


def same_as(run, whole):
    assert folder_hashes(run / "final") == folder_hashes(whole / "final")
    assert logged(run) == logged(whole)
    assert read_manifest(run)["status"] == "finished"
    assert not [path for path in run.iterdir() if path.name.startswith((".saving", ".replaced"))]


def spawn(run, *before, **settings):
    start = before or (sys.executable, "-m", "oprd")
    return subprocess.Popen(
        [*start, *command(run, **settings)],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()[-8000:]
        time.sleep(0.05)
    pytest.fail(f"{path} never came")


@pytest.mark.parametrize(
    ("place", "call", "when"),
    [
        ("oprd.training.checkpoints:save_tree", 5, "after"),  # the second checkpoint, half written
        ("oprd.training.run:write_card", 1, "before"),  # final/ is there, its record is not
    ],
)
def test_killed_and_repeated(whole, tmp_path, place, call, when):
    run = tmp_path / "run"
    process = spawn(run, sys.executable, str(HARNESS), "--child", place, str(call), when)
    _, told = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, told[-2000:]
    assert main(command(run)) == 0
    same_as(run, whole)


def test_a_checkpoint_holds_no_pickle(whole):
    names = {path.name for path in (whole / "checkpoint-6").rglob("*")}
    assert {"model.safetensors", "optimizer.safetensors", "optimizer.json", "process-0.json", "checksums.json"} <= names
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}


def test_sigterm_saves_and_the_same_command_continues(whole, tmp_path):
    run = tmp_path / "run"
    process = spawn(run, save_steps=100)
    wait_for(run / "config.yaml", process)
    time.sleep(0.5)
    process.terminate()
    _, told = process.communicate(timeout=100)
    assert process.returncode == 0, told[-2000:]
    (line,) = [line for line in told.splitlines() if "stopped by SIGTERM" in line]
    (saved,) = run.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 1 <= step < 6
    assert line == f"oprd: stopped by SIGTERM at step {step}, checkpoint-{step} written; the same command continues"
    assert read_manifest(run)["status"] == "interrupted"
    assert main(command(run, save_steps=100)) == 0
    same_as(run, whole)


def test_sigterm_with_two_processes(tmp_path):
    """Both stop after the same update, and the run goes on as if it had not been stopped."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "oprd"]
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 100}
    alone, run = tmp_path / "alone", tmp_path / "run"
    process = spawn(alone, *launcher, **settings)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told[-4000:]
    process = spawn(run, *launcher, **settings)
    wait_for(run / "config.yaml", process)
    process.terminate()
    _, told = process.communicate(timeout=100)
    assert told.count("stopped by SIGTERM at step") == 1, told[-2000:]
    (saved,) = run.glob("checkpoint-*")
    assert {path.name for path in saved.glob("process-*.json")} == {"process-0.json", "process-1.json"}
    process = spawn(run, *launcher, **settings)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told[-4000:]
    same_as(run, alone)


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(run / "final")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"status": "running", "final": None, "config": {**manifest["config"], "output_dir": str(run)}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    weights = run / "checkpoint-6" / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(command(run)) == 0
    told = capsys.readouterr().err
    assert (
        "Damaged: checkpoint-6 (optimizer.safetensors has another content than was written). Going on from checkpoint-4"
        in told
    )
    same_as(run, whole)


def limited(size):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_no_room_for_a_checkpoint(whole, tmp_path):
    """Files of more than 1.2 MB fail as on a full disk: the optimiser's does, the model's does not."""
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "oprd", *command(run)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200, preexec_fn=limited(1_200_000),
    )  # fmt: skip
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(f"oprd: error: {run}/checkpoint-2 could not be written") and "File too large" in error
    assert not [path for path in run.iterdir() if "checkpoint" in path.name]
    assert read_manifest(run)["status"] == "failed"
    assert main(command(run)) == 0  # there is room again
    same_as(run, whole)
