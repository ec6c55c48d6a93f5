"""One process and two (gloo, DDP) take the same steps, also when a term leaves the LM head without gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


CASES = {
    "the head gets no gradient: DDP must not wait for it": {"logit_weight": 0, "lm_head": "keep"},
    "nor for blocks above the highest layer": {"logit_weight": 0, "layers": [1]},
    "composite": {
        "output_loss": "full",
        "layers": [1, 2],
        "positions": "first_k",
        "position_k": 2,
        "answers": ["7"] * 16,
    },
    "through a bridge": {"other": "shape", "lm_head": "keep"},
    "another tokenizer, bridge and prefix marginals": {"other": "tokenizer", "output_loss": "top_k"},
}


def launch(out, processes):
    out.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(Path(__file__).with_name("worker.py")), str(out), str(8 // processes), json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return [launch(root / str(processes), processes) for processes in (1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(runs, case):
    one, two = (run[case] for run in runs)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, weights in one["weights"].items():
        assert two["weights"][name] == pytest.approx(weights, abs=5e-6), name
    for key in one.keys() - {"weights", "processes"}:
        assert two[key] == pytest.approx(one[key], rel=1e-4), key
