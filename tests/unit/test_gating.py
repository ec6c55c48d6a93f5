import json
import shutil

import pytest
import yaml

from oprd.cli import main
from oprd.lineage.hashing import combined_hash, folder_hashes
from runs import make_run, write_answers

GOOD, BAD, UNEVEN = [1] * 8, [0] * 8, [1, 0, 1, 1, 0, 1, 1, 1]


@pytest.fixture
def gates(tmp_path):
    """Write a gates file; its path."""

    def write(**config):
        path = tmp_path / "gates.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", GOOD)


def gate(candidate, config, *more):
    return main(["gate", str(candidate), "--config", config, *map(str, more)])


def outcome(run):
    return json.loads((run / "gate.json").read_text())


def final_hash(run):
    return combined_hash(folder_hashes(run / "final"))


def test_passed_is_0_and_kept_with_the_content_that_was_judged(run, gates, capsys):
    assert gate(run, gates(accuracy={"min": 60})) == 0
    found = outcome(run)
    assert found["passed"] is True
    assert found["model_hash"] == final_hash(run)
    assert (found["candidate"], found["against"]) == (str(run), None)
    assert found["config"] == {"accuracy": {"min": 60}}
    (verdict,) = found["verdicts"]
    assert (verdict["gate"], verdict["benchmark"], verdict["state"]) == ("accuracy.min", "quiz", "pass")
    printed = capsys.readouterr()
    assert verdict["reason"] in printed.out
    assert "Passed." in printed.err


@pytest.mark.parametrize(
    ("config", "status"),
    [
        ({"accuracy": {"min": 80}}, 3),  # undecided
        ({"accuracy": {"min": 80}, "undecided": "pass"}, 0),
        ({"accuracy": {"min": 80}, "decide_by": "value"}, 0),
        ({"length": {"max": 9}}, 3),
        ({"length": {"max": 9}, "accuracy": {"min": 60}}, 3),
        ({"cost": {"max_wall_hours": 0.01}}, 3),
        ({"cost": {"max_wall_hours": 0.1}}, 0),
    ],
)
def test_shut_is_3(run, gates, capsys, config, status):
    assert gate(run, gates(**config)) == status
    assert outcome(run)["passed"] is (status == 0)
    assert ("Not passed." in capsys.readouterr().err) is (status == 3)


def test_against_a_baseline(run, tmp_path, gates):
    worse, better = make_run(tmp_path / "worse", BAD), make_run(tmp_path / "better", UNEVEN)
    drop = gates(accuracy={"max_drop": 0})
    assert gate(run, drop, "--against", worse) == 0
    assert gate(run, drop, "--against", run) == 0
    assert gate(worse, drop, "--against", run) == 3
    assert outcome(worse)["against"] == str(run)
    assert gate(run, drop, "--against", write_answers(better / "elsewhere", UNEVEN)) == 0


@pytest.mark.parametrize(
    ("more", "config", "told"),
    [
        (["--against"], {"accuracy": {"max_drop": 0}}, "is neither a run"),
        ([], {"accuracy": {"max_drop": 0}}, "Name one with --against"),
        ([], {"acuracy": {"min": 0}}, "did you mean accuracy?"),
        ([], {"accuracy": {"min": 0}, "benchmarks": ["other"]}, "--on other"),
    ],
)
def test_a_fault_is_1_and_leaves_the_last_outcome(run, tmp_path, gates, capsys, more, config, told):
    assert gate(run, gates(accuracy={"min": 60})) == 0
    before = outcome(run)
    assert gate(run, gates(**config), *(part for flag in more for part in (flag, tmp_path / "nowhere"))) == 1
    error = capsys.readouterr().err
    assert told in error and "oprd: error:" in error
    assert outcome(run) == before


def test_no_gates_file_is_a_fault(run, tmp_path, capsys):
    assert gate(run, str(tmp_path / "none.yaml")) == 1
    assert "There is no" in capsys.readouterr().err
    assert not (run / "gate.json").exists()


def test_a_run_that_was_not_evaluated_is_a_fault(tmp_path, gates, capsys):
    assert gate(make_run(tmp_path / "run"), gates(accuracy={"min": 1})) == 1
    assert f"oprd eval {tmp_path / 'run'} --on BENCHMARK" in capsys.readouterr().err


def test_json_is_what_is_kept_and_nothing_else(run, gates, capsys):
    assert gate(run, gates(accuracy={"min": 99}), "--json") == 3
    assert json.loads(capsys.readouterr().out) == outcome(run)


def test_a_folder_of_evaluations_is_judged_but_has_no_final_student(tmp_path, gates, capsys):
    folder = write_answers(tmp_path / "model", GOOD)
    assert gate(folder, gates(accuracy={"min": 60}), "--json") == 0
    assert json.loads(capsys.readouterr().out)["model_hash"] is None
    assert not list(tmp_path.rglob("gate.json"))
    assert gate(folder, gates(cost={"max_wall_hours": 1})) == 1


def promote(registry, run, *more):
    return main(["registry", "promote", str(registry), str(run), *more])


def test_the_registry_takes_what_passed(run, tmp_path, gates, capsys):
    registry = tmp_path / "registry"
    assert promote(registry, run) == 1
    assert "no gates ran on it" in capsys.readouterr().err
    assert gate(run, gates(accuracy={"min": 99})) == 3
    assert promote(registry, run) == 1
    assert "did not pass its gates" in capsys.readouterr().err
    assert gate(run, gates(accuracy={"min": 60})) == 0
    assert promote(registry, run) == 0
    for name in ("config.json", "model.safetensors"):
        assert (registry / "current" / name).read_bytes() == (run / "final" / name).read_bytes()
    assert main(["registry", "verify", str(registry)]) == 0


@pytest.mark.parametrize("change", ["another", "one more", "one less"])
def test_the_registry_refuses_files_that_no_gate_has_seen(run, tmp_path, gates, capsys, change):
    (run / "final" / "vocabulary.txt").write_text("a b")
    write_answers(run / "evaluations" / "final", GOOD, identity={"model_hash": final_hash(run)})
    assert gate(run, gates(accuracy={"min": 60})) == 0
    if change == "another":
        (run / "final" / "model.safetensors").write_text("other weights")
    elif change == "one more":
        (run / "final" / "generation_config.json").write_text("{}")
    else:
        (run / "final" / "vocabulary.txt").unlink()
    assert promote(tmp_path / "registry", run) == 1
    error = capsys.readouterr().err
    assert "its gates judged other files" in error and final_hash(run) in error
    assert not (tmp_path / "registry" / "current").exists()


def test_a_card_that_is_written_anew_is_no_change(run, tmp_path, gates):
    assert gate(run, gates(accuracy={"min": 60})) == 0
    (run / "final" / "README.md").write_text("prose")
    assert promote(tmp_path / "registry", run) == 0


def test_the_gate_of_one_run_opens_for_no_other(run, tmp_path, gates):
    other = make_run(tmp_path / "other", GOOD, weights="other weights")
    assert gate(run, gates(accuracy={"min": 60})) == 0
    shutil.copy(run / "gate.json", other / "gate.json")
    assert promote(tmp_path / "registry", other) == 1


def test_scores_of_other_files_open_no_gate(run, tmp_path, gates, capsys):
    """A gate would vouch for files that nobody evaluated."""
    (run / "final" / "model.safetensors").write_text("other weights")
    assert gate(run, gates(accuracy={"min": 60})) == 1
    error = capsys.readouterr().err
    assert "has changed since it was evaluated on quiz" in error and f"oprd eval {run} --on quiz" in error
    assert not (run / "gate.json").exists()
    candidate = make_run(tmp_path / "candidate", GOOD)
    assert gate(candidate, gates(accuracy={"max_drop": 0}), "--against", run) == 1


def test_scores_of_the_last_update_stand_for_the_final_student(tmp_path, gates):
    run = make_run(tmp_path / "run", steps=4)
    write_answers(run / "evaluations" / "step-000002", BAD)
    write_answers(run / "evaluations" / "step-000004", GOOD)
    assert gate(run, gates(accuracy={"min": 60})) == 0
    (run / "final" / "model.safetensors").write_text("other weights")
    assert gate(run, gates(accuracy={"min": 60})) == 1
