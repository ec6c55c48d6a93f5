"""One golden trajectory of the miniature through the real command line.

python tests/integration/test_golden.py      # write it anew, after a change that is meant to move it
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden.json")
LIBRARIES = ("torch", "transformers", "trl")
KEYS = ("loss", "loss/representation", "cosine", "accuracy", "completions/mean_length", "grad_norm")
ARGUMENTS = [
    "--max_steps",
    "5",
    "--per_device_train_batch_size",
    "16",
    "--logging_steps",
    "1",
    "--disable_tqdm",
    "true",
]


def trajectory(directory):
    from oprd.cli import main
    from oprd.training.callbacks import read_metrics

    assert main(["train", "--config", "miniature", "--output_dir", str(directory), *ARGUMENTS]) == 0
    rows = [row for row in read_metrics(Path(directory) / "metrics.jsonl") if "loss" in row]
    return {key: [row[key] for row in rows] for key in KEYS}


def test_golden_trajectory(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    same = all(golden["versions"][name] == version(name) for name in LIBRARIES)
    ours = trajectory(tmp_path)
    # Other versions may sample other answers: then only the first step's size can be held to.
    steps, tolerance = (5, 2e-3) if same else (1, 0.2)
    for key in KEYS:
        assert ours[key][:steps] == pytest.approx(golden[key][:steps], rel=tolerance, abs=1e-4), key


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        found = trajectory(scratch)
    GOLDEN.write_text(json.dumps({"versions": {name: version(name) for name in LIBRARIES}} | found, indent=1) + "\n")
