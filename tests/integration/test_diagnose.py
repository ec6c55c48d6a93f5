"""``oprd diagnose`` through the command line, on the miniature's models."""

import json
import shutil

import pytest
import yaml

from oprd.cli import main

FEW = ["--prompts", "15", "--max_new_tokens", "40", "--data", "miniature:train.jsonl"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def diagnose(capsys, *arguments):
    assert main(["diagnose", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


PAIRS = {
    "same family": ("student", "teacher", "direct", {"representation_weight": 1.0, "lm_head": "auto"}),
    "sibling": ("plus", "minus", "direct", {"representation_weight": 1.0, "lm_head": "auto"}),
    "another origin": ("student", "wide-teacher", "bridge", {"bridge": "auto", "lm_head": "solved"}),
    "another tokenizer": ("digit-student", "teacher", "outputs", {"representation_weight": 0, "output_loss": "full"}),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_told_apart_and_the_recipe_is_one(kind, capsys, tmp_path):
    student, teacher, expected, keys = PAIRS[kind]
    out = tmp_path / "out"
    accuracy = [] if kind == "same family" else ["--skip_accuracy"]
    shown = diagnose(
        capsys,
        "--student",
        f"miniature:{student}",
        "--teacher",
        f"miniature:{teacher}",
        *FEW,
        "--out",
        str(out),
        *accuracy,
    )
    record = json.loads((out / "diagnosis.json").read_text())
    assert record["verdict"] == expected
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert keys.items() <= recipe.items() == record["recipe"].items()
    for one in record["advice"]:
        assert f"{one['topic']}: {one['say']}" in shown
    found = record["students"]["student"]
    drawn = {path.stem for path in (out / "plots").glob("*.png")}
    assert drawn >= {"layers", "cka", "activations"} and ("positions" in drawn) is (
        kind != "another tokenizer" or "cosine" in found["layers"][0]
    )
    if kind == "same family":
        scores = {name: score["value"] for name, score in found["accuracy"].items()}
        assert scores["teacher"] > scores["teacher_under_student_head"] > scores["student"]
        assert found["heads"]["drift"] == pytest.approx(0.215, abs=0.001)
    else:
        assert "accuracy" not in found
    if kind == "sibling":
        again = [
            "--student",
            "miniature:plus",
            "--teacher",
            "miniature:minus",
            *FEW,
            *accuracy,
            "--out",
            str(tmp_path / "b"),
        ]
        assert json.loads(diagnose(capsys, *again, "--json"))["students"] == record["students"]
    if kind == "another tokenizer":
        assert 0.6 < found["paired_share"] < 0.9
    assert record["recipe"]["output_dir"] == f"runs/{out.name}"  # not that of another diagnosis
    looked_at = ["plan"] if kind == "another origin" else ["show", "--resolved"]  # either reads the recipe whole
    assert main([*looked_at, *(["--config"] if "plan" in looked_at else []), str(out / "recipe.yaml"), "--json"]) == 0


def test_a_run_is_read_before_and_after_on_the_same_answers(capsys, tmp_path):
    run = tmp_path / "run"
    train = ["--max_steps", "4", "--per_device_train_batch_size", "8", "--output_dir", str(run)]
    assert main(["train", "--config", "miniature", *train]) == 0
    capsys.readouterr()
    record = json.loads(diagnose(capsys, str(run), "--prompts", "15", "--json"))
    assert record == json.loads((run / "diagnosis" / "diagnosis.json").read_text())
    before, after = (record["students"][name] for name in ("before", "after"))
    assert record["answers"]["written_by"] == "after" and record["answers"]["max_new_tokens"] == 44
    assert "recipe" not in record
    assert after["heads"]["drift"] < 1e-6 < 0.2 < before["heads"]["drift"]  # the run adopted the teacher's head
    assert before["accuracy"]["teacher"] == after["accuracy"]["teacher"]
    assert all(one["cka"] > 0.5 for one in (*before["layers"], *after["layers"]))

    shutil.rmtree(run / "final")
    assert main(["diagnose", str(run)]) == 1
    assert "not finished" in capsys.readouterr().err


def test_a_teacher_that_sees_more_is_diagnosed_before_a_self_distillation(capsys, tmp_path):
    out = tmp_path / "out"
    same = [
        "--student",
        "miniature:careless",
        "--teacher",
        "miniature:careless",
        "--teacher_prompt_template",
        "??{prompt}",
    ]
    diagnose(capsys, *same, *FEW, "--out", str(out))
    record = json.loads((out / "diagnosis.json").read_text())
    scores = record["students"]["student"]["accuracy"]
    assert scores["teacher"]["value"] > scores["student"]["value"] + 20
    assert record["recipe"]["teacher_model_kind"] == "base"
    assert record["recipe"]["teacher_prompt_template"] == "??{prompt}"
    assert record["verdict"] == "direct"
    assert main(["show", str(out / "recipe.yaml"), "--resolved", "--json"]) == 0


BAD = {
    "nothing": ([], "--student, --teacher, --data missing"),
    "no data": (["--student", "miniature:student", "--teacher", "miniature:teacher"], "--data missing"),
    "no such student": (["--student", "miniature:nobody", "--teacher", "miniature:teacher", *FEW], "miniature:student"),
    "few prompts": (
        [
            "--student",
            "miniature:student",
            "--teacher",
            "miniature:teacher",
            "--data",
            "miniature:train.jsonl",
            "--prompts",
            "2",
        ],
        "--prompts must be at least 5",
    ),
    "no room": (
        [
            "--student",
            "miniature:student",
            "--teacher",
            "miniature:teacher",
            *FEW[:2],
            *FEW[4:],
            "--max_new_tokens",
            "100000",
        ],
        "max_new_tokens",
    ),
    "no run": (["nowhere"], "not a run of oprd train"),
    "ignored": (["nowhere", "--student", "miniature:student"], "--student would be ignored"),
    "not JSON": (
        ["--student", "miniature:student", "--teacher", "miniature:teacher", *FEW, "--chat_template_kwargs", "{"],
        "--chat_template_kwargs is not JSON",
    ),
    "no such column": (
        [
            "--student",
            "miniature:student",
            "--teacher",
            "miniature:student",
            *FEW,
            "--teacher_prompt_template",
            "{prompt} {hint}",
        ],
        "hint",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_weights_are_read(case, capsys, monkeypatch):
    import oprd.insight.diagnosis as module

    monkeypatch.setattr(module, "load_engine", lambda *a, **k: pytest.fail("weights were read"))
    arguments, words = BAD[case]
    assert main(["diagnose", *arguments]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
