"""One process and two (gloo, DDP) take the same steps, also when a term leaves the LM head without gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def launch(out, processes, settings):
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(Path(__file__).with_name("worker.py")), str(out), str(8 // processes), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_weight": 0, "lm_head": "keep"},  # the head gets no gradient: DDP must not wait for it
        {"output_loss": "full", "layers": [1, 2], "positions": "first_k", "position_k": 2, "answers": ["7"] * 16},
        {"logit_weight": 0, "layers": [1]},  # nor for the blocks above
    ],
)
def test_two_processes_equal_one(tmp_path, settings):
    one, two = (launch(tmp_path / str(n), n, settings) for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, weights in one["weights"].items():
        assert two["weights"][name] == pytest.approx(weights, abs=5e-6), name
    for key in ("loss", "cosine", "loss/representation", "loss/output", "completions/mean_length", "accuracy"):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key
