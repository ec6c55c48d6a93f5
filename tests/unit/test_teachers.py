"""Which teacher reads a row, and the settings of each of several."""

import pytest
from datasets import Dataset

from oprd import OPRDConfig
from oprd.training.teacher_settings import parse_teachers
from oprd.training.teachers import Routes, named_teachers


@pytest.fixture
def make(tmp_path):
    return lambda **settings: OPRDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def routes_of(args):
    return Routes.of(named_teachers(args), args.teacher_column)


def test_settings_of_each(make):
    args = make(
        teachers={
            "a": {"model_name_or_path": "x", "model_revision": "r", "weight": 2},
            "b": {"url": "http://localhost:1", "token_file": "t"},
            "c": {"model_name_or_path": "z", "bridge": "bridge-to-z", "when": {"prompt": "q"}},
        },
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        layers="even",
    )
    a, b, c = named_teachers(args)
    assert (a.name, a.weight, a.args.teacher_model_name_or_path, a.args.teacher_model_revision) == ("a", 2, "x", "r")
    assert (b.weight, b.args.teacher_url, b.args.teacher_token_file) == (1.0, "http://localhost:1", "t")
    assert b.args.teacher_model_init_kwargs is None and a.args.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert c.args.bridge == "bridge-to-z" and c.when["prompt"].pattern == "q"
    assert all(one.args.layers == "even" and one.args.teachers is None for one in (a, b, c))
    assert args.teachers.keys() == {"a", "b", "c"}  # the run's own settings are as they were


def test_one_teacher_has_no_name(make):
    (only,) = named_teachers(make(teacher_model_name_or_path="x"), "given", "bridge")
    assert (only.name, only.model, only.bridge, only.weight) == (None, "given", "bridge", 1.0)
    assert Routes.of([only], None) is None


def test_models_given_by_name_need_no_settings(make):
    found = named_teachers(make(), {"a": "one", "b": "two"}, {"b": "bridge"})
    assert [(one.name, one.model, one.bridge) for one in found] == [("a", "one", None), ("b", "two", "bridge")]
    assert Routes.of(found, None) is None  # all read every row


def test_by_column(make):
    args = make(teachers={"a": {"model_name_or_path": "x"}, "b": {"model_name_or_path": "y"}}, teacher_column="kind")
    routes = routes_of(args)
    assert routes.columns == ("kind",)
    assert [routes.index({"kind": name}) for name in "abba"] == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="kind is 'A', which is none of a, b"):
        routes.index({"kind": "A"})


def test_by_rules(make):
    one = {"model_name_or_path": "x"}
    rules = {
        "code": {**one, "when": {"prompt": r"def |class ", "lang": "^py"}},
        "maths": {**one, "when": {"prompt": r"\d"}},
        "rest": one,
    }
    routes = routes_of(make(teachers=rules))
    assert routes.columns == ("prompt", "lang")
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "write def f"}]
    rows = [
        ({"prompt": "def f", "lang": "python"}, "code"),
        ({"prompt": "def f", "lang": "c"}, "rest"),  # every pattern of a teacher must match
        ({"prompt": "class 3", "lang": "c"}, "maths"),
        ({"prompt": chat, "lang": "py"}, "code"),
        ({"prompt": "hello", "lang": None}, "rest"),
    ]
    assert [list(rules)[routes.index(row)] for row, _ in rows] == [name for _, name in rows]


def test_rows_are_looked_at_before_anything_runs(make):
    args = make(teachers={"a": {"model_name_or_path": "x"}, "b": {"model_name_or_path": "y"}}, teacher_column="kind")
    routes = routes_of(args)
    routes.check(Dataset.from_dict({"prompt": ["1", "2"], "kind": ["a", "b"]}), "train_dataset")
    routes.check(Dataset.from_dict({"prompt": ["1"], "kind": ["a"]}), "eval_dataset")  # which may leave one out
    with pytest.raises(ValueError, match="No row of train_dataset asks b"):
        routes.check(Dataset.from_dict({"prompt": ["1"], "kind": ["a"]}), "train_dataset")


def test_a_mapping_as_text():
    assert parse_teachers('{"a": {"weight": 2}}') == {"a": {"weight": 2}}
    assert parse_teachers("{a: {weight: 2}}") == {"a": {"weight": 2}}
    assert parse_teachers(None) is None
