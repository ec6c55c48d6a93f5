"""A run with benchmarks from the command line: its manifest, its best student, and the way to make it again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from oprd.cli import main
from oprd.lineage.evaluations import find_evaluations
from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.lineage.manifest import read_manifest
from oprd.models import resolve_path
from oprd.training.callbacks import read_metrics

BENCHMARKS = {
    "validation_benchmark": "miniature:validation.jsonl",
    "test_benchmarks": "miniature:test.jsonl",
    "benchmark_steps": 2,
    "benchmark_limit": 6,
    "benchmark_samples": 2,
}


def train(directory, *arguments, status=0, **settings):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, **settings}
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    start = arguments or ("--config", "miniature", "--output_dir", str(directory))
    assert main(["train", *start, *(() if arguments else flags)]) == status
    return Path(directory)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run of four updates, scored before, between and after."""
    return train(tmp_path_factory.mktemp("runs") / "scored", **BENCHMARKS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same run without benchmarks."""
    return train(tmp_path_factory.mktemp("runs") / "plain")


def test_the_manifest_says_what_it_was_made_of(scored):
    manifest = read_manifest(scored)
    assert manifest["status"] == "finished"
    assert manifest["last_update"] == 4
    for role in ("student", "teacher"):
        assert manifest[role]["hash"] == combined_hash(folder_hashes(Path(resolve_path(f"miniature:{role}"))))
    assert manifest["final"]["hash"] == combined_hash(folder_hashes(scored / "final"))
    assert manifest["data"]["train"]["rows"] == 4096
    assert manifest["data"]["validation"]["rows"] == manifest["data"]["test"]["rows"] == 6
    assert manifest["seeds"]["seed"] == 0 and manifest["parent"] is None and manifest["bridge"] is None
    (session,) = manifest["sessions"]
    assert session["updates"] == 4
    logged = sum(row.get("response_tokens", 0) for row in read_metrics(scored / "metrics.jsonl") if "loss" in row)
    assert session["tokens_generated"] == session["tokens_trained"] == manifest["cost"]["tokens_generated"] == logged
    assert 0 < session["benchmark_seconds"] < session["wall_seconds"]
    assert session["peak_memory_bytes"] > 1e8


def test_scores_before_between_and_after(scored):
    found = {(one.who, one.benchmark) for one in find_evaluations(scored)}
    assert found == {(f"step-00000{n}", name) for n in (0, 2, 4) for name in ("validation", "test")}
    rows = {row["step"]: row for row in read_metrics(scored / "metrics.jsonl") if "validation/avg_at_k" in row}
    assert sorted(rows) == [0, 2, 4]
    for one in find_evaluations(scored):
        assert rows[one.step][f"{one.benchmark}/avg_at_k"] == one.summary["avg_at_k"]["value"]  # not test/test


def test_the_best_student_is_the_one_that_validation_likes_best(scored):
    values = {
        one.step: one.summary["avg_at_k"]["value"] for one in find_evaluations(scored) if one.benchmark == "validation"
    }
    best = min(step for step in values if values[step] == max(values.values()))  # the first of equals
    score = json.loads((scored / "best" / "score.json").read_text())
    assert (score["step"], score["benchmark"], score["value"]) == (best, "validation", values[best])
    assert [path.name for path in scored.glob("best-step-*")] == [f"best-step-{best:06d}"]
    AutoModelForCausalLM.from_pretrained(scored / "best")


def test_benchmarks_do_not_change_the_training(scored, plain):
    assert folder_hashes(scored / "final") == folder_hashes(plain / "final")


def test_a_run_made_again_is_the_same_bit_for_bit(plain, tmp_path, capsys):
    again = train(tmp_path / "again", "--from", str(plain), "--output_dir", str(tmp_path / "again"))
    assert "bit-identical" in capsys.readouterr().err
    assert folder_hashes(again / "final") == folder_hashes(plain / "final")
    assert read_manifest(again)["repeats"]["final"] == read_manifest(plain)["final"]
    ours, theirs = (
        [{k: v for k, v in row.items() if k in ("step", "loss", "grad_norm", "accuracy")} for row in read_metrics(run / "metrics.jsonl")]
        for run in (again, plain)
    )  # fmt: skip
    assert ours == theirs


def test_a_repetition_with_another_setting_says_so(plain, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "other"), "--learning_rate", "1e-3"]
    train(tmp_path / "other", "--from", str(plain), *flags)
    assert "learning_rate: 0.002 then" in capsys.readouterr().err


def test_a_repetition_with_other_inputs_is_refused(tmp_path, capsys):
    student = shutil.copytree(resolve_path("miniature:student"), tmp_path / "student")
    data = tmp_path / "prompts.jsonl"
    lines = Path(resolve_path("miniature:train.jsonl")).read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:64]))
    run = train(tmp_path / "run", model_name_or_path=student, dataset_name=data, max_steps=1)
    flags = ["--from", str(run), "--output_dir", str(tmp_path / "again")]

    data.write_text("".join(lines[:63]))
    train(tmp_path / "again", *flags, status=1)
    assert "data (train)" in capsys.readouterr().err
    data.write_text("".join(lines[:64]))
    (student / "generation_config.json").write_text('{"eos_token_id": 1, "pad_token_id": 0, "top_k": 3}')
    train(tmp_path / "again", *flags, status=1)
    told = capsys.readouterr().err
    assert "student" in told and "generation_config.json" in told
    assert not (tmp_path / "again").exists()


def test_a_student_of_a_run_knows_its_parent(plain, tmp_path):
    run = train(tmp_path / "child", model_name_or_path=plain / "final", max_steps=1)
    manifest = read_manifest(run)
    assert manifest["parent"] == {"run": str(plain), "final": read_manifest(plain)["final"]["hash"]}
    assert "`miniature:student` distilled from" in (run / "final" / "README.md").read_text()


def test_a_run_that_fails_pre_flight_leaves_nothing(tmp_path, capsys):
    train(tmp_path / "bad", max_completion_length=300, status=1)
    assert "do not fit the context" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"benchmark_samples": 8}, "would be ignored"),
        ({"validation_benchmark": "miniature:test.jsonl"}, "need benchmark_steps"),
        (
            {"test_benchmarks": "miniature:test.jsonl", "benchmark_steps": 2, "best_metric": "best_at_k"},
            "never on a test",
        ),
        ({**BENCHMARKS, "best_metric": "loss"}, "best_metric must be"),
        ({**BENCHMARKS, "best_metric": "pass_at_3"}, "benchmark_samples of at least 3"),
        ({**BENCHMARKS, "test_benchmarks": "miniature:validation.jsonl"}, "Two benchmarks are called validation"),
        ({**BENCHMARKS, "benchmark_max_new_tokens": 250}, "Lower max_new_tokens"),
        ({**BENCHMARKS, "test_benchmarks": "nothing"}, "There is no benchmark 'nothing'"),
    ],
)
def test_bad_benchmarks_are_refused(tmp_path, capsys, settings, told):
    train(tmp_path / "bad", status=1, **settings)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_validation_on_test_problems_is_refused_whatever_the_files_are_called(tmp_path, capsys):
    copy = tmp_path / "mine.jsonl"
    lines = Path(resolve_path("miniature:test.jsonl")).read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[3:8]))
    train(tmp_path / "bad", status=1, **{**BENCHMARKS, "validation_benchmark": str(copy)})
    assert "shares 3 problems" in capsys.readouterr().err


def test_problems_that_are_trained_on_are_told(tmp_path, capsys):
    copy = tmp_path / "seen.jsonl"
    lines = Path(resolve_path("miniature:train.jsonl")).read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[:4]))
    train(tmp_path / "run", max_steps=1, test_benchmarks=copy, benchmark_steps=5, benchmark_samples=1)
    assert "4 of 4 problems of seen are among the training prompts" in capsys.readouterr().err


def test_a_resumed_run_adds_a_session_and_ends_the_same(plain, tmp_path, capsys):
    """Stopped in the middle, as a kill after a checkpoint would."""
    from oprd.training import run as runs

    class Stop(Exception):
        pass

    def stop(trainer, *_):
        raise Stop

    saved = {"save_strategy": "steps", "save_steps": 2}
    directory = tmp_path / "run"
    original = runs.save_final
    runs.save_final = stop
    try:
        with pytest.raises(Stop):
            train(directory, **saved)
    finally:
        runs.save_final = original
    manifest = read_manifest(directory)
    assert manifest["status"] == "failed" and manifest["sessions"][0]["error"] == "Stop: "
    shutil.rmtree(directory / "checkpoint-4")
    flags = ["--config", "miniature", "--output_dir", str(directory), "--max_steps", "4", "--save_strategy", "steps"]
    flags += ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "2", "--resume"]
    assert main(["train", *flags]) == 0
    manifest = read_manifest(directory)
    assert manifest["status"] == "finished"
    assert [session["updates"] for session in manifest["sessions"]] == [4, 2]
    assert manifest["sessions"][0]["hardware"] == manifest["sessions"][1]["hardware"]
    assert "changed_settings" not in manifest["sessions"][1]
    total = sum(session["tokens_generated"] for session in manifest["sessions"])
    assert manifest["cost"]["tokens_generated"] == total > manifest["sessions"][0]["tokens_generated"]
    assert folder_hashes(directory / "final") == folder_hashes(plain / "final")


def test_processes_share_the_benchmarks_and_agree(scored, tmp_path):
    """Before the first update the student is the same, so two processes must come to one process's answers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "oprd"]
    flags = {**BENCHMARKS, "max_steps": 1, "per_device_train_batch_size": 2, "benchmark_batch_size": 128}
    flags |= {"output_dir": tmp_path / "two"}
    command += ["train", "--config", "miniature", *(str(p) for k, v in flags.items() for p in (f"--{k}", v))]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("validation", "test"):
        ours, theirs = (
            run / "evaluations" / "step-000000" / name / "responses.jsonl" for run in (tmp_path / "two", scored)
        )
        assert ours.read_bytes() == theirs.read_bytes()
    manifest = read_manifest(tmp_path / "two")
    assert manifest["status"] == "finished" and manifest["sessions"][0]["hardware"]["processes"] == 2
    assert manifest["cost"]["device_hours"] == pytest.approx(
        2 * (manifest["cost"]["wall_seconds"] - manifest["cost"]["benchmark_seconds"]) / 3600, abs=1e-4
    )


def test_the_hub_gets_the_student_and_its_card_alone(tmp_path, monkeypatch):
    import transformers

    from oprd.training import run as runs

    sent = []
    monkeypatch.setattr(
        transformers.Trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/student")
    )
    monkeypatch.setattr(transformers.Trainer, "push_to_hub", lambda *_, **__: pytest.fail("the whole run was pushed"))
    monkeypatch.setattr(runs, "upload_folder", lambda **what: sent.append(what))
    run = train(tmp_path / "run", max_steps=1, push_to_hub=True, hub_token="hf_secret")
    assert sent == [{"repo_id": "me/student", "folder_path": run / "final", "token": "hf_secret"}]
    assert (run / "final" / "README.md").exists()
    assert not any(
        "hf_secret" in path.read_text() for path in run.glob("*.*") if path.suffix in (".json", ".yaml", ".html")
    )
    assert "hf_secret" not in (run / "final" / "README.md").read_text()


def test_a_finished_run_has_nothing_to_resume(tmp_path, capsys):
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run = train(tmp_path / "run", **saved)
    before = {path: path.read_bytes() for path in run.rglob("*.json*") if "plots" not in path.parts}
    train(run, **{**saved, "resume": True})
    assert "there is nothing to resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / "README.md").exists()  # TRL's card of a checkpoint
    train(run, status=1, **{**saved, "max_steps": 3, "learning_rate": "1e-3", "resume": True})
    assert "learning_rate would be ignored" in capsys.readouterr().err
    assert read_manifest(run)["last_update"] == 2


def test_a_run_resumed_with_other_settings_says_so(tmp_path, capsys):
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run = train(tmp_path / "run", **saved)
    train(run, **{**saved, "max_steps": 2, "resume": True})
    manifest = read_manifest(run)
    assert manifest["sessions"][1]["changed_settings"] == {"max_steps": [1, 2]}
    assert manifest["config"]["max_steps"] == 2 and manifest["last_update"] == 2
    train(tmp_path / "again", "--from", str(run), "--output_dir", str(tmp_path / "again"))
    assert "was resumed with another max_steps" in capsys.readouterr().err
