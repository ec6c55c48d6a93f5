"""What is diagnosed, settled from files alone: of a run what its recipe says, of two models what training would accept."""

import json
import shutil
from pathlib import Path

import pytest

from oprd.insight import cases, diagnosis
from oprd.insight.cases import Prompts, case_of_models, case_of_run, fit_of
from oprd.lineage.scoring import Subject
from oprd.models import resolve_path

PROMPTS = Prompts("miniature:train.jsonl", prompts=6)


def model(folder: Path, name: str = "student", **settings) -> str:
    """A copy of a shipped model with other settings in its config."""
    shutil.copytree(resolve_path(f"miniature:{name}"), folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def run_of(monkeypatch, teacher: dict, **recipe):
    """A run of which only the record is there."""
    manifest = {"directory": ".", "teacher": teacher, "config": {"dataset_name": PROMPTS.data, **recipe}}
    monkeypatch.setattr(cases, "read_manifest", lambda run: manifest)

    def subjects(run, roles, out):
        names = list(teacher.get("teachers", {})) if roles == ["teacher"] else []
        return [Subject(name, f"path/{name}", f"commit of {name}", Path(), name) for name in names or roles]

    monkeypatch.setattr(cases, "subjects_of", subjects)


def test_an_answer_has_room_in_the_teachers_context_too(tmp_path):
    teacher = model(tmp_path / "short", "teacher", max_position_embeddings=40)
    case = case_of_models("miniature:student", teacher, PROMPTS)
    rows = case.prompts.draw()
    fit = fit_of(case, rows)
    prompts, room = diagnosis._encode(case, fit, rows, diagnosis.Settings())
    assert room == 40 - max(map(len, prompts))
    with pytest.raises(ValueError, match="Lower max_new_tokens"):
        diagnosis._encode(case, fit, rows, diagnosis.Settings(max_new_tokens=40))


def test_a_pruned_student_with_another_teacher_gets_a_layer_map_to_train_with(tmp_path):
    pruned = model(tmp_path / "pruned", oprd_layer_map=[1, 2, 4, 6])
    for teacher, expected in ((pruned, [1, 2, 3, 4]), ("miniature:student", [1, 2, 3, 4])):
        case = case_of_models(pruned, teacher, PROMPTS)
        facts = fit_of(case, case.prompts.draw()).facts
        assert facts["layer_map"] == expected and not facts["pruned_from_teacher"]


def test_the_layer_map_of_a_runs_recipe_is_compared(monkeypatch):
    run_of(monkeypatch, {"name": "teacher"}, layer_map="1,1,2,4")
    assert case_of_run("run", {}).layer_map == [1, 1, 2, 4]
    case = case_of_models("miniature:student", "miniature:teacher", PROMPTS)
    case = cases.replace(case, layer_map=[1, 1, 2, 4])
    assert fit_of(case, case.prompts.draw()).layer_map == [1, 1, 2, 4]


def test_one_of_several_teachers_is_named_as_the_run_does(monkeypatch):
    run_of(monkeypatch, {"name": "plus + minus", "teachers": {"plus": {}, "minus": {}}})
    assert case_of_run("run", {}, teacher="minus").teacher.expected == "minus"
    assert case_of_run("run", {}, teacher="elsewhere").teacher.path == "elsewhere"
    with pytest.raises(ValueError, match=r"plus, minus.*--teacher"):
        case_of_run("run", {})


def test_a_teacher_at_an_address_is_to_be_named(monkeypatch):
    run_of(monkeypatch, {"name": "http://127.0.0.1:8765"})
    with pytest.raises(ValueError, match=r"8765.*--teacher"):
        case_of_run("run", {})


def test_the_same_model_at_another_revision_is_another_teacher():
    case = case_of_models("owner/model", "owner/model", PROMPTS, revisions=("main", "later"))
    case = cases.replace(case, template="{prompt}!")
    found = {"layers": [{"explained": 0.9, "distance": 1.0}], "bridge": None, "heads": {}}
    files = {"reading": "same", "layer_map": None, "pruned_from_teacher": False}
    record = {"files": files, "students": {"student": found}, "answers": {"max_new_tokens": 9}}
    recipe = diagnosis._recipe(case, record, "runs/mine")
    assert recipe["teacher_model_revision"] == "later" and "teacher_model_kind" not in recipe
