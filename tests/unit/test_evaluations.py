import pytest

from oprd.lineage.evaluations import Found, find_evaluations, last_update, of_final
from oprd.lineage.manifest import read_manifest
from runs import make_run, quiz, write_answers


def found(who, benchmark="quiz"):
    return Found(who, benchmark, None, {})


def test_every_finished_evaluation_in_order(tmp_path):
    run = make_run(tmp_path / "run")
    assert find_evaluations(run) == []
    folders = [
        write_answers(run / "evaluations" / who, [1, 0], on=quiz(name, 2))
        for who, name in (("final", "a"), ("final", "b"), ("step-000004", "a"), ("teacher", "a"))
    ]
    unfinished = write_answers(run / "evaluations" / "student", [1, 0])
    (unfinished / "summary.json").unlink()
    evaluations = find_evaluations(run)
    assert [one.directory for one in evaluations] == folders
    assert [(one.who, one.benchmark) for one in evaluations[1:3]] == [("final", "b"), ("step-000004", "a")]
    assert evaluations[0].summary["avg_at_k"]["value"] == 50


@pytest.mark.parametrize(
    ("who", "step"),
    [("step-000000", 0), ("step-000120", 120), ("step-7", 7), ("final", None), ("step-", None), ("step-by-step", None)],
)
def test_the_update_is_in_the_name(who, step):
    assert found(who).step == step


def test_of_final_is_final_or_the_last_update():
    final, last, early, teacher = found("final"), found("step-000010"), found("step-000005"), found("teacher")
    for order in ([final, last, early, teacher], [teacher, early, last, final]):
        assert of_final(order, 10) == {"quiz": final}
    assert of_final([early, last, teacher], 10) == {"quiz": last}
    assert of_final([early, last, teacher], 5) == {"quiz": early}
    assert of_final([early, last, teacher]) == {}
    assert of_final([found("step-000000")], 0) == {"quiz": found("step-000000")}
    other = found("step-000010", "other")
    assert of_final([final, last, other], 10) == {"quiz": final, "other": other}


def test_the_last_update_of_a_run(tmp_path):
    assert last_update(read_manifest(make_run(tmp_path / "done", steps=7))) == 7
    assert last_update(read_manifest(make_run(tmp_path / "stopped", finished=False))) is None
