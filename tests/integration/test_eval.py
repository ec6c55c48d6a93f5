"""``oprd eval`` through the command line: what it leaves, that a kill costs nothing, and that others get the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset

from oprd.cli import main
from oprd.evaluation.evaluate import read_evaluation

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("OPRD_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


def run(capsys, *arguments):
    status = main(["eval", *map(str, arguments)])
    return status, capsys.readouterr()


def problem_set(tmp_path, name):
    """The real file where it lies beside the checkout, else one in its layout."""
    if (SHARED / f"{name}.parquet").exists():
        return SHARED / f"{name}.parquet"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Find {a}+{a}. Put your final answer within \\boxed{{}}."}],
            "reward_model": {"ground_truth": f"{2 * a}.0", "style": "rule"},
        }
        for a in range(30)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path / f"{name}.parquet"


def test_public_problem_sets_on_a_miniature(capsys, tmp_path):
    """Completes, and a script that knows nothing of this library comes to the same numbers."""
    files = [problem_set(tmp_path, name) for name in ("aime24", "aime25", "aimo")]
    status, said = run(
        capsys, "miniature:teacher", "--on", *files, "miniature:test.jsonl", "--samples", 2, "--limit", 12, "--out", tmp_path / "out"
    )  # fmt: skip
    assert status == 0, said.err
    assert said.out.count("miniature:teacher") == 4
    folders = [tmp_path / "out" / name for name in ("aime24", "aime25", "aimo", "test")]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "recompute_summary.py", *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DIFFERS" not in done.stdout
    summary = json.loads((folders[3] / "summary.json").read_text())
    assert summary["avg_at_k"]["value"] > 80  # the teacher knows its task
    assert summary["avg_at_k"]["low"] < summary["avg_at_k"]["value"] <= summary["avg_at_k"]["high"]
    assert summary["no_box"] == 0
    hard = json.loads((folders[0] / "summary.json").read_text())  # a miniature cannot read, let alone solve these
    assert hard["avg_at_k"]["value"] == 0 and hard["avg_at_k"]["high"] > 5
    prompt = json.loads((folders[0] / "problems.json").read_text())[0]["prompt"]
    assert prompt.count("\\boxed") == 1


def start(out):
    command = [sys.executable, "-m", "oprd", "eval", "miniature:student", "--on", "miniature:test.jsonl"]
    command += ["--samples", "4", "--batch_size", "32", "--seed", "7", "--out", str(out)]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def size(path):
    return path.stat().st_size if path.exists() else 0


def test_killed_at_random_moments(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(timeout=300) == 0
    total = size(whole / "test" / "responses.jsonl")
    generator = random.Random(5)
    moments = sorted(generator.uniform(0, 0.9) for _ in range(3))
    killed = 0
    for moment in moments:
        process = start(broken)
        deadline = time.monotonic() + 120
        while process.poll() is None and size(broken / "test" / "responses.jsonl") <= moment * total:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not (broken / "test" / "summary.json").exists()
    assert killed == 3
    before = size(broken / "test" / "responses.jsonl")
    assert 0 < before < total
    assert start(broken).wait(timeout=300) == 0
    for name in ("responses.jsonl", "summary.json", "problems.json", "settings.json"):
        assert (broken / "test" / name).read_bytes() == (whole / "test" / name).read_bytes()


def test_a_finished_evaluation_is_not_drawn_again(capsys, tmp_path, monkeypatch):
    arguments = ("miniature:student", "--on", "miniature:test.jsonl", "--samples", 1, "--limit", 4, "--out", tmp_path)
    assert run(capsys, *arguments)[0] == 0
    before = (tmp_path / "test" / "responses.jsonl").read_bytes()
    from oprd.evaluation import evaluate
    from oprd.evaluation.sampling import TransformersEngine

    def fail(*_, **__):
        raise AssertionError("drawn or graded twice")

    monkeypatch.setattr(TransformersEngine, "generate", fail)
    monkeypatch.setattr(evaluate, "judge", fail)
    assert run(capsys, *arguments)[0] == 0
    assert (tmp_path / "test" / "responses.jsonl").read_bytes() == before
    status, said = run(capsys, *arguments, "--temperature", 0.9)
    assert status == 1
    assert "sampling" in said.err and "0.9" in said.err
    status, said = run(capsys, *arguments, "--suffix", "Hurry.")  # another question is another evaluation
    assert status == 1 and "benchmark" in said.err
    evaluation, summary = read_evaluation(tmp_path / "test")
    assert len(evaluation.ids) == summary["problems"] == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody/nothing", "--on", "miniature:test.jsonl"], "nobody/nothing is no folder here, and the Hub has not given it"),
        (["miniature:student", "--on", "nothing"], "There is no benchmark 'nothing'"),
        (["miniature:student", "--on", "nothing.jsonl"], "There is no file nothing.jsonl"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--of", "teacher"], "is not a run of oprd train"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--max_new_tokens", "250"], "Lower max_new_tokens"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--temperature", "0"], "Set samples: 1"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--top_p", "0"], "top_p must lie in"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--samples", "0"], "samples must be at least 1"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--limit", "0"], "limit must be at least 1"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--prompt_format", "chat"], "needs a chat template"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--engine", "vllm"], "vLLM is not installed"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--max_model_len", "99"], "options of engine: vllm"),
        (["miniature:student", "--on", "miniature:test.jsonl", "miniature:test.jsonl"], "Two benchmarks are called test"),
        (["miniature:student", "--on", "miniature:test.jsonl", "--chat_template_kwargs", "{"], "is not JSON"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_weights_are_loaded(capsys, tmp_path, monkeypatch, arguments, told):
    import transformers

    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    status, said = run(capsys, *arguments, "--out", tmp_path)
    assert status == 1
    assert told in said.err
    assert said.out == ""
