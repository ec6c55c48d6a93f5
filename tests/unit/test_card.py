import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from oprd.insight.compare import interval
from oprd.lineage.card import hub_id, render_card, root_student, write_card
from oprd.lineage.manifest import read_manifest
from runs import evaluate_run, make_run, quiz, record

COMMIT = "c0ffee" * 6 + "c0ff"
HUB_STUDENT = record("Qwen/Qwen3-1.7B-Base", "e" * 64, revision=COMMIT)
CONFIG = {"dataset_name": "open-r1/DAPO-Math-17k", "learning_rate": 1e-6, "output_dir": "runs/one"}


def card_of(run):
    return ModelCard.load(write_card(run))


def recipe_of(card):
    (block,) = re.findall(r"```yaml\n(.*?)\n```", card.content, re.S)
    return yaml.safe_load(block)


def tables(card):
    """Rows of cells, headers and rules included."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in card.content.splitlines() if "|" in line]


def test_the_front_matter_of_a_run_between_models_of_the_hub(tmp_path):
    run = make_run(tmp_path / "run", [1, 0], student=HUB_STUDENT, config=CONFIG)
    assert (run / "final" / "README.md").read_text().startswith("---\n")
    data = card_of(run).data
    assert data.base_model == "Qwen/Qwen3-1.7B-Base"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.datasets == ["open-r1/DAPO-Math-17k"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"oprd", "distillation"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.dataset_name, result.dataset_type) == ("quiz", "quiz")  # a file is no data set of the Hub
    assert (result.metric_name, result.metric_type, result.metric_value) == ("Avg@1", "accuracy", 50.0)
    assert (result.task_type, data.model_name) == ("text-generation", "run")


def test_the_best_student_has_a_card_of_its_own(tmp_path):
    run = make_run(tmp_path / "run", [1, 0])
    (run / "best-step-000002").mkdir()
    (run / "best").symlink_to("best-step-000002")
    score = {"step": 2, "benchmark": "quiz", "metric": "avg_at_k", "value": 75.0, "low": 40.0, "high": 90.0}
    (run / "best" / "score.json").write_text(json.dumps(score))
    evaluate_run(run, [1, 1, 1, 0], who="step-000002", on=quiz("other", 4))
    final, best = card_of(run), ModelCard.load(run / "best" / "README.md")
    assert "best student, the one after update 2" in best.content and "best student" not in final.content
    assert "75.0 [40.0, 90.0]" in best.content and "flatters" in best.content
    assert [row[0] for row in tables(best) if row[0] in ("quiz", "other")] == ["other"]
    assert [row[0] for row in tables(final) if row[0] in ("quiz", "other")] == ["quiz"]


@pytest.mark.parametrize("name", ["miniature:student", "models/tiny", "./tiny", "/models/tiny", "../tiny"])
def test_no_base_model_that_nobody_else_has(tmp_path, name):
    """Also where its folder is gone, or lies below another folder than this one."""
    data = card_of(make_run(tmp_path / "run", student=record(name))).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()


def test_a_folder_of_a_cache_is_no_name_on_the_hub(tmp_path):
    path = tmp_path / "models--a--b" / "snapshots" / COMMIT
    path.mkdir(parents=True)
    assert card_of(make_run(tmp_path / "run", student=record(str(path), revision=COMMIT))).data.base_model is None


def test_no_data_set_that_nobody_else_has(tmp_path):
    work = tmp_path / "work"
    (work / "data" / "folder").mkdir(parents=True)
    for index, name in enumerate(("miniature:train.jsonl", "data/train.jsonl", "data/gone.parquet", "data/folder")):
        run = make_run(tmp_path / str(index), config=CONFIG | {"dataset_name": name}, directory=str(work))
        assert card_of(run).data.datasets is None


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "Qwen/Qwen3-1.7B-Base", "a/b.c"):
        assert hub_id(name) == name
    for name in (None, "", "miniature:student", "a/b/c", "/a", "a b", "a/b.jsonl", "data.PARQUET", "-a"):
        assert hub_id(name) is None
    (tmp_path / "gpt2").mkdir()
    assert hub_id("gpt2") is None
    monkeypatch.chdir("/")
    assert hub_id("gpt2", tmp_path) is None


def child(tmp_path, name, of):
    return make_run(
        tmp_path / name, student=record(f"{of}/final"), parent={"run": str(of), "final": "f" * 64}, config=CONFIG
    )


def test_a_line_of_runs_began_with_a_student_of_the_hub(tmp_path):
    first = make_run(tmp_path / "first", student=HUB_STUDENT)
    third = child(tmp_path, "third", child(tmp_path, "second", first))
    assert root_student(read_manifest(third)) == HUB_STUDENT
    card = card_of(third)
    assert card.data.base_model == "Qwen/Qwen3-1.7B-Base"
    assert "`Qwen/Qwen3-1.7B-Base` distilled from `miniature:teacher`" in card.content


@pytest.mark.parametrize("damage", ["gone", "broken", "foreign"])
def test_a_parent_that_cannot_be_read_ends_the_line(tmp_path, damage):
    first = make_run(tmp_path / "first", student=HUB_STUDENT)
    second = child(tmp_path, "second", first)
    path = first / "manifest.json"
    path.unlink() if damage == "gone" else path.write_text("{" if damage == "broken" else "{}")
    assert root_student(read_manifest(second))["name"] == f"{first}/final"
    assert card_of(second).data.base_model is None


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_line_that_bites_its_tail_ends(tmp_path, length):
    names = [str(tmp_path / f"run{i}") for i in range(length)]
    for i, name in enumerate(names):
        make_run(tmp_path / f"run{i}", student=record(f"student{i}"), parent={"run": names[i - 1], "final": None})
        assert name in names
    assert root_student(read_manifest(tmp_path / "run0"))["name"].startswith("student")


def test_without_evaluations(tmp_path):
    card = card_of(make_run(tmp_path / "run"))
    assert "model-index" not in card.data.to_dict() and card.data.eval_results is None
    assert "Not evaluated yet" in card.content


def test_the_numbers_are_those_of_the_evaluations(tmp_path):
    run = make_run(tmp_path / "run")
    right = [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]
    cut = [[0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    evaluate_run(run, right, on=quiz("sums", 4, source="org/sums"), cut_off=cut, tokens=[10, 20, 30, 41])
    evaluate_run(run, [1] * 8, on=quiz("more", 8))
    evaluate_run(run, [0] * 8, on=quiz("more", 8), who="teacher")
    evaluate_run(run, [0] * 8, on=quiz("early", 8), who="step-000002")
    card = card_of(run)
    rows = {row[0]: row for row in tables(card) if row[0] in ("sums", "more", "early")}
    assert rows.keys() == {"sums", "more"}
    summary = json.loads((run / "evaluations" / "final" / "sums" / "summary.json").read_text())
    assert summary["avg_at_k"]["value"] == 50 and summary["best_at_k"]["value"] == 75
    shown = [interval(summary[name]) for name in ("avg_at_k", "best_at_k", "mean_length")]
    assert rows["sums"] == ["sums", "4", "3", *shown, "25.0 %"]
    assert rows["sums"][5].startswith("25.2 [") and rows["more"][3] == "100.0 [67.6, 100.0]"
    assert "temperature 0.7, top_p 0.95, at most 64 new tokens" in card.content
    results = {one.dataset_name: one for one in card.data.eval_results}
    assert {name: one.metric_value for name, one in results.items()} == {"sums": 50.0, "more": 100.0}
    assert (results["sums"].metric_name, results["sums"].dataset_type) == ("Avg@3", "org/sums")


def test_what_went_in_and_what_it_cost(tmp_path):
    bridge = record("runs/bridge", "9" * 64)
    run = make_run(tmp_path / "run", bridge=bridge, seconds=5400, processes=2, memory=3_140_000_000, tokens=1234567)
    content = card_of(run).content
    for label, name, digest in (
        ("student", "miniature:student", "a"),
        ("teacher", "miniature:teacher", "b"),
        ("bridge", "runs/bridge", "9"),
        ("data: train", "miniature:train.jsonl", "c"),
    ):
        assert f"| {label} | `{name}` | `{digest * 16}` |" in content
    assert "1.50 hours on 2 x " in content
    assert "1,234,567 tokens generated, 1,234,567 trained on, 3.1 GB at most (host)." in content


def test_the_recipe_is_the_one_of_the_run(tmp_path):
    config = CONFIG | {
        "alpha": 0.5,
        "teacher_model_init_kwargs": {"max_memory": {"cpu": "1GB"}},
        "layers": [1, "2", None, True],
        "suffix": "Réfléchis: --- # {}\n\nput it in \\boxed{}.\n",
        "max_new_tokens": 5,
        "eos_token": "<|im_end|>",
    }
    card = card_of(make_run(tmp_path / "run", config=config))
    assert recipe_of(card) == config


def test_no_secret_is_in_a_card(tmp_path, monkeypatch):
    secret = "hf_" + "x" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    config = CONFIG | {"model_init_kwargs": {"token": secret, "dtype": "float32"}, "hub_token": secret}
    run = make_run(tmp_path / "run", config=config, command=["oprd", "train", "--hub_token", secret])
    card = card_of(run)
    assert secret not in str(card)
    assert recipe_of(card) == CONFIG | {"model_init_kwargs": {"dtype": "float32"}}


def test_a_card_can_be_written_again(tmp_path):
    run = make_run(tmp_path / "run")
    assert write_card(run) == run / "final" / "README.md"
    before = (run / "final" / "README.md").read_text()
    evaluate_run(run, [1, 0])
    write_card(run)
    after = (run / "final" / "README.md").read_text()
    assert after != before and after == str(render_card(run))
    assert not [path.name for path in (run / "final").iterdir() if path.name.startswith(".")]
