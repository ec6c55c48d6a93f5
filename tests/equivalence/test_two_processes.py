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
    "packed, another tokenizer: prompts move with their rows": {
        "other": "tokenizer",
        "output_loss": "top_k",
        "max_tokens_per_microbatch": 26,
        "gradient_accumulation_steps": 2,
    },
    "packed, the head and the last block get no gradient": {
        "max_tokens_per_microbatch": 22,
        "logit_weight": 0,
        "lm_head": "keep",
        "layers": [2],
    },
    "packed suffixes": {
        "max_tokens_per_microbatch": 22,
        "gradient_scope": "suffix",
        "output_loss": "full",
        "positions": "last_k",
        "position_k": 2,
        "reduction": "token",
        "answers": [str(n) for n in range(16)],
    },
}

HINTS = ["s", "solution9", "q1", "hint" * 40, "a", "bb", "ccc", "d4"] * 2
ROUTED = {
    "several": True,
    "teachers": {"a": {}, "b": {"weight": 2.0}},
    "teacher_column": "kind",
    "columns": {"kind": (["a"] * 4 + ["b"] * 4) * 2},  # so that a process has rows of one teacher only
}
TEACHERS = {
    "each row its teacher": {**ROUTED, "logit_weight": 0, "lm_head": "keep"},
    "each row its teacher, packed": {**ROUTED, "max_tokens_per_microbatch": 22, "output_loss": "full"},
    "all teachers": {"several": True, "teachers": {"a": {}, "b": {}}, "logit_weight": 0, "lm_head": "teacher"},
    **{
        f"itself, {kind}": {
            "teacher_model_kind": kind,
            "teacher_prompt_template": "{hint}{prompt}",
            "columns": {"hint": HINTS},
            "output_loss": output,
        }
        for kind, output in (("base", "none"), ("ema", "full"), ("live", "full"))
    },
    "changes, adaptive": {"representation_loss": "transition", "positions": "adaptive", "layer_weighting": "adaptive"},
    "attention maps": {"attention_weight": 1.0, "attention_layers": [1, 3], "attention_keys": 3},
}


def launch(out, processes):
    out.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        *launcher,
        str(Path(__file__).with_name("worker.py")),
        str(out),
        str(8 // processes),
        json.dumps(CASES | TEACHERS),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return [launch(root / str(processes), processes) for processes in (1, 2)]


@pytest.mark.parametrize("case", CASES | TEACHERS)
def test_two_processes_equal_one(runs, case):
    one, two = (run[case] for run in runs)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, weights in one["weights"].items():
        assert two["weights"][name] == pytest.approx(weights, abs=5e-6), name
    for key in one.keys() - {"weights", "processes", "counts"}:
        assert two[key] == pytest.approx(one[key], rel=1e-4), key


def test_processes_share_the_rows_and_go_in_step(runs):
    """Rows are dealt out by length; where one process has fewer micro-batches than another, it cuts further."""
    uneven = 0
    for case, settings in CASES.items():
        (one,), two = (run[case]["counts"] for run in runs)
        assert one["passes"] == one["own"]
        assert two[0]["passes"] == two[1]["passes"] >= max(process["own"] for process in two)
        if "max_tokens_per_microbatch" in settings:
            assert two[0]["passes"] < one["passes"]
        else:
            assert two[0]["passes"] == one["passes"] == 3
        uneven += two[0]["own"] != two[1]["own"]
    assert uneven
