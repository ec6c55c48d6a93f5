import json
import shutil
from pathlib import Path

import pytest

from oprd.evaluation import evaluate
from oprd.evaluation.evaluate import read_evaluation
from oprd.evaluation.sampling import load_engine
from oprd.lineage import scoring
from oprd.lineage.inputs import model_record
from oprd.lineage.manifest import SCHEMA
from oprd.lineage.scoring import Subject, score_models, subjects_of
from oprd.models import resolve_path
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models in folders of their own."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher", "final", "best")):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """A finished run, which knows its teacher by a path below the folder that it was started in."""
    run, home = tmp_path / "some-run", tmp_path / "home"
    shutil.copytree(models / "teacher", home / "models" / "teacher")
    for role in ("final", "best"):
        shutil.copytree(models / role, run / role)
    monkeypatch.chdir(home)
    manifest = {
        "schema": SCHEMA,
        "run": "some-run",
        "directory": str(home),
        "config": {},
        "sessions": [{}],
        "cost": {},
        "student": model_record(str(models / "student")),
        "teacher": model_record("models/teacher"),
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def rewrite(run, **changes):
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def problems(tmp_path):
    for name, pairs in {"sums": [("ab", "1"), ("abcd", "2")], "more": [("c", "3")]}.items():
        lines = [json.dumps({"problem": text, "answer": answer}) + "\n" for text, answer in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return [str(tmp_path / "sums.jsonl"), str(tmp_path / "more.jsonl")]


def score(subjects, benchmarks, *, loading=None, prompts=None, sampling=None, **settings):
    settings = {"max_new_tokens": 4, "batch_size": 3, **settings}
    return score_models(
        subjects,
        benchmarks,
        sampling={"samples": 2, "seed": 3, **(sampling or {})},
        loading={"device": "cpu", **(loading or {})},
        prompts={"suffix": "", **(prompts or {})},
        **settings,
    )


# Whose answers


@pytest.mark.parametrize(
    ("model", "revision", "out", "where"),
    [
        ("Some/Model-1B", None, None, "evaluations/Some--Model-1B"),
        ("Some/Model-1B", "abc", None, "evaluations/Some--Model-1B"),
        ("Some/Model-1B", None, "there", "there"),
        ("miniature:teacher", None, None, "evaluations/teacher"),
    ],
)
def test_a_model_by_name(model, revision, out, where):
    assert subjects_of(model, ["final"], out, revision) == [Subject(model, resolve_path(model), revision, Path(where))]


def test_a_folder_with_a_model(models):
    path = str(models / "student")
    expected = [Subject(path, path, None, Path("evaluations") / f"{models.name}--student")]
    assert subjects_of(path, ["final"], None) == expected
    assert subjects_of(path, ["final"], "x")[0].out == Path("x")


def test_the_roles_of_a_run(run, models):
    made = subjects_of(str(run), ["final", "best", "student", "teacher"], None)
    evaluations, student = run / "evaluations", model_record(str(models / "student"))
    assert made == [
        Subject("some-run final", str(run / "final"), None, evaluations / "final"),
        Subject("some-run best", str(run / "best"), None, evaluations / "best"),
        Subject("some-run student", str(models / "student"), None, evaluations / "student", student["hash"]),
        Subject(
            "some-run teacher", "models/teacher", None, evaluations / "teacher", model_record("models/teacher")["hash"]
        ),
    ]
    assert [subject.out for subject in subjects_of(str(run), ["best", "final"], "x")] == [
        Path("x/best"),
        Path("x/final"),
    ]


def test_a_teacher_is_found_from_anywhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (teacher,) = subjects_of(str(run), ["teacher"], None)
    assert teacher.path == str(tmp_path / "home" / "models" / "teacher")


def test_a_model_of_the_hub_or_the_package_in_a_run(run):
    hub = {"name": "Some/Teacher", "revision": "c0ffee", "hash": "h"}
    rewrite(run, teacher=hub, student=model_record("miniature:student"))
    teacher, student = subjects_of(str(run), ["teacher", "student"], None)
    assert (teacher.path, teacher.revision, teacher.expected) == ("Some/Teacher", "c0ffee", "h")
    assert student.path == resolve_path("miniature:student")


@pytest.mark.parametrize(("role", "told"), [("final", "It has not finished"), ("best", "Set validation_benchmark")])
def test_a_student_that_is_not_there(run, role, told):
    shutil.rmtree(run / role)
    with pytest.raises(ValueError, match=f"some-run holds no {role} student. {told}"):
        subjects_of(str(run), [role], None)


@pytest.mark.parametrize("roles", [["teacher"], ["final", "teacher"], ["best"]])
def test_roles_of_what_is_no_run(models, roles):
    with pytest.raises(ValueError, match=f"is not a run of oprd train .* so --of {' '.join(roles)} says nothing"):
        subjects_of(str(models / "student"), roles, None)


def test_other_things_that_are_refused(run, models):
    with pytest.raises(ValueError, match="neither a model"):
        subjects_of(str(models), ["final"], None)
    with pytest.raises(ValueError, match="revision would be ignored"):
        subjects_of(str(run), ["final"], None, "main")
    rewrite(run, schema=99)
    with pytest.raises(ValueError, match="another schema"):
        subjects_of(str(run), ["final"], None)


# Scores


def test_every_role_on_every_benchmark(run, models, problems, monkeypatch):
    roles, loaded = ["final", "student", "teacher"], []

    def load(path, **settings):
        loaded.append(path)
        return load_engine(path, **settings)

    monkeypatch.setattr(scoring, "load_engine", load)
    results = list(score(subjects_of(str(run), roles, None), problems))
    folders = [run / "evaluations" / role / name for role in roles for name in ("sums", "more")]
    assert [folder for _, folder, _ in results] == folders
    assert [subject.label for subject, _, _ in results[::2]] == [f"some-run {role}" for role in roles]
    assert loaded == [str(run / "final"), str(models / "student"), "models/teacher"]
    for subject, folder, summary in results:
        evaluation, written = read_evaluation(folder)
        assert written == summary
        made = model_record(subject.path)
        assert (
            summary["settings"].items() >= {"model": subject.path, "revision": None, "model_hash": made["hash"]}.items()
        )
        expected = {"samples": 2, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 4, "batch_size": 3, "seed": 3}
        assert summary["settings"]["sampling"] == expected
        rows = [json.loads(line) for line in Path(folder.parents[3] / f"{folder.name}.jsonl").read_text().splitlines()]
        twins = [{"prompt": row["problem"], "answer": row["answer"]} for row in rows]
        engine = load_engine(subject.path, device="cpu")
        assert evaluate.evaluate(engine.model, engine.tokenizer, twins, **expected) == evaluation


def test_a_second_call_changes_nothing_and_another_seed_is_refused(run, problems):
    subjects = subjects_of(str(run), ["final"], None)
    (first,) = score(subjects, problems[:1])
    files = {path: path.read_bytes() for path in first[1].iterdir()}
    assert list(score(subjects, problems[:1])) == [first]
    assert {path: path.read_bytes() for path in first[1].iterdir()} == files
    with pytest.raises(ValueError, match=r"other settings \(sampling"):
        list(score(subjects, problems[:1], sampling={"seed": 4}))


def test_length_and_batch_size_by_default(run, problems):
    subjects = subjects_of(str(run), ["final"], None)
    (made,) = score(subjects, problems[:1], max_new_tokens=None, batch_size=None)
    chosen = made[2]["settings"]["sampling"]
    assert (chosen["max_new_tokens"], chosen["batch_size"]) == (128 - 4, 64)


def test_the_template_is_used_and_told(run, problems):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tail }}"
    tokenizer.save_pretrained(run / "final")
    subjects = subjects_of(str(run), ["final"], None)
    (made,) = score(subjects, problems[:1], template={"tail": "a" * 100}, max_new_tokens=None)
    settings = made[2]["settings"]
    assert (settings["prompt_format"], settings["chat_template_kwargs"]) == ("chat", {"tail": "a" * 100})
    assert settings["sampling"]["max_new_tokens"] == 128 - 104


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(scoring, "load_engine", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_changed_teacher_is_refused(run, problems, no_weights, file):
    path = Path("models/teacher") / file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="models/teacher is not what it was when the run began"):
        list(score(subjects_of(str(run), ["final", "teacher"], None), problems))


def test_prose_beside_a_teacher_may_change(run, problems):
    Path("models/teacher/README.md").write_text("new")
    assert len(list(score(subjects_of(str(run), ["teacher"], None), problems[:1]))) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_new_tokens": 125}, r"sums.jsonl: Problem 2: .* leaves 124 .*, not 125"),
        ({"prompts": {"suffix": "a" * 130}}, r"sums.jsonl: Problem 2: .* leaves 0 of the context of 128"),
        ({"loading": {"max_model_len": 5}}, r"sums.jsonl: Problem 2: .* leaves 1 of the context of 5 .*, not 4"),
        ({"prompts": {"prompt_format": "chat"}}, "needs a chat template"),
        ({"sampling": {"temperature": 0}}, "Set samples: 1"),
    ],
)
def test_checks_come_before_weights(run, problems, no_weights, settings, told):
    with pytest.raises(ValueError, match=told):
        list(score(subjects_of(str(run), ["final", "teacher"], None), problems, **settings))
    assert not (run / "evaluations").exists()


def test_two_benchmarks_of_one_name(run, problems, tmp_path, no_weights):
    (tmp_path / "other").mkdir()
    shutil.copy(problems[0], tmp_path / "other")
    with pytest.raises(ValueError, match="Two benchmarks are called sums"):
        list(score(subjects_of(str(run), ["final"], None), [*problems, str(tmp_path / "other" / "sums.jsonl")]))
